"""What a comparison refuses, and what its tasks promise."""

import pytest

from natgrad_lab.compare import protocol as rules
from natgrad_lab.compare.protocol import Protocol, check, plan_of
from natgrad_lab.compare.tasks import Profile, Task, find_task, tasks
from natgrad_lab.data import Digits
from natgrad_lab.models import Mlp
from natgrad_lab.train.optimizers import Sgd
from natgrad_lab.train.recipe import Recipe

PROFILES = {"small": Profile(("Nesterov", "KFAC"), (100, "full"), trials=4, seeds=2, finalists=1)}
TASK = Task("tiny", "a test", Recipe(Digits(), Mlp((16,)), Sgd()), ((100, 8),), 4, (0.5,), PROFILES)


REFUSED = {
    "trials": ({"trials": 0}, "trials=0"),
    "seeds": ({"seeds": -1}, "seeds=-1"),
    "steps": ({"steps": 0}, "steps=0"),
    "batch": ({"batch": (0,)}, "batch=0.*full"),
    "workers": ({"workers": 0}, "workers=0"),
    "both": ({"workers": 2, "ranks": 2}, "workers=2 beside ranks=2"),
    "an optimizer": ({"optimizers": ("nobody",)}, "'nobody'"),
    "a profile": ({"profile": "huge"}, "'huge'.*small"),
    "a share": ({"far_behind": 1.5}, "far_behind=1.5.*--far-behind"),
    "no settings": ({"settings": "no/such"}, "'no/such' holds no finished comparison"),
    "a size alone": ({"settings_batch": 100}, "settings_batch=100 .*without --settings"),
    "points beside": (
        {"settings": "runs/a", "trials": 3},
        "trials=3 says nothing where settings are taken.*--trials out",
    ),
    "a share beside": ({"settings": "a", "far_behind": 0.5}, "far_behind=0.5 .*leave --far-behind out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_protocols_are_refused_by_value(name, tmp_path):
    changes, says = REFUSED[name]
    with pytest.raises(ValueError, match=says):
        check(TASK, Protocol(out=str(tmp_path / "out"), **changes))
    assert not (tmp_path / "out").exists()


def test_data_elsewhere_are_named_and_refused_where_there_are_none():
    task = find_task("cifar100-small").located("no/such")
    with pytest.raises(ValueError, match="'no/such'"):
        check(task, Protocol())
    with pytest.raises(ValueError, match=r"--data.path 'x' says nothing to tiny"):
        TASK.located("x")
    assert rules.task_values(task) == rules.task_values(find_task("cifar100-small"))


@pytest.mark.parametrize("name", sorted(tasks()))
def test_every_profile_of_a_task_names_who_and_what_it_knows(name):
    task = find_task(name)
    for title, profile in task.profiles.items():
        assert len(task.chosen(profile.optimizers)) == len(profile.optimizers)
        assert all(task.steps_of(batch) >= 8 for batch in profile.batch)
        first_order = [one for one in task.chosen(profile.optimizers) if one.kind == "first-order"]
        assert first_order, "somebody has to set the goal"
        assert plan_of(task, Protocol(profile=title)).profile == profile
    with pytest.raises(ValueError, match=r"did you mean|choose among"):
        find_task(name + "x")


def test_a_profile_that_tunes_nothing_asks_for_settings():
    task = find_task("text")
    with pytest.raises(ValueError, match=r"trials=0 must be at least 1 .*--settings to the folder"):
        check(task, Protocol(profile="large"))
    check(task, Protocol(profile="large", trials=1))


def test_stated_settings_stand_in_for_tuning():
    task = find_task("text")
    plan = plan_of(task, Protocol(profile="demo"))
    assert rules.steps_of(task, Protocol(profile="demo"), 32) == 200
    for contender in task.chosen(plan.profile.optimizers):
        (values,) = plan.transfer.values(contender, 32)
        assert set(values) == set(contender.all_of())
    with pytest.raises(ValueError, match=r"states no settings of LARS.*--trials"):
        check(task, Protocol(profile="demo", optimizers=("LARS",)))
    assert plan_of(task, Protocol(profile="demo", trials=2)).transfer is None
    with pytest.raises(ValueError, match=r"settings_batch=32 says nothing without --settings"):
        check(task, Protocol(profile="demo", settings_batch=32))
