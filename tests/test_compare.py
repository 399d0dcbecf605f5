"""The comparison: equal budgets, choice on held-out images, taking up again, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch

from natgrad.data import Digits
from natgrad.models import Mlp
from natgrad.parallel import World, run_threads
from natgrad.train import compare, trials
from natgrad.train.optimizers import Sgd, SpNgd
from natgrad.train.protocol import Protocol, check, plan_of
from natgrad.train.tasks import Contender, Task, find_task, tasks
from natgrad.train.trials import Trial, agree, ranking

FIRST = Contender("SGD", Sgd(), {"lr": (0.01, 0.1, 1.0), "momentum": (0.0, 0.9)})
SECOND = Contender("SP-NGD", SpNgd(), {"lr": (0.01, 0.1), "damping": (1e-3, 1e-2, 1e-1)})
TASK = Task("tiny", "a test", Digits(), Mlp((16,)), (FIRST, SECOND), steps=4, batch_share=1 / 3)
PROTOCOL = Protocol(trials=3, finalists=2, seeds=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    protocol = replace(PROTOCOL, out=str(tmp_path_factory.mktemp("made") / "out"))
    check(TASK, protocol)
    assert compare.run(TASK, protocol, World()) == "finished"
    return protocol, json.loads((Path(protocol.out or "") / "results.json").read_text())


def test_everyone_gets_the_same_number_of_trials_steps_and_seeds(made):
    _, results = made
    assert [len(entry["trials"]) for entry in results["tuned"]] == [3 + 2 * 2, 3 + 2 * 2]
    budgets = {(run["contender"], run["budget"], run["seed"]) for run in results["finals"]}
    assert budgets == {(name, steps, seed) for name in ("SGD", "SP-NGD") for steps in (4, 2) for seed in (1, 2)}
    assert {len(run["steps"]) == run["budget"] for run in results["finals"]} == {True}
    assert {run["batch"] for run in results["finals"]} == {479}


def test_what_tuning_chose_is_its_best_and_is_what_was_run(made):
    _, results = made
    for entry in results["tuned"]:
        by_point = {}
        for trial in entry["trials"]:
            by_point.setdefault(json.dumps(trial["values"]), []).append(trial)
        assert sorted(len(seen) for seen in by_point.values()) == [1, 3, 3]
        first = {point: (seen[0]["accuracy"], -seen[0]["loss"]) for point, seen in by_point.items()}
        assert min(first, key=lambda point: first[point]) == next(p for p, seen in by_point.items() if len(seen) == 1)
        finalists = {point: fmean(t["accuracy"] for t in seen) for point, seen in by_point.items() if len(seen) == 3}
        assert finalists[json.dumps(entry["values"])] == max(finalists.values())
        runs = [run for run in results["finals"] if run["contender"] == entry["name"]]
        assert all(run["values"] == entry["values"] for run in runs)


def test_final_runs_are_judged_after_every_step(made):
    _, results = made
    for run in results["finals"]:
        assert [point["step"] for point in run["evaluations"]] == list(range(1, run["budget"] + 1))
        assert all({"accuracy", "loss", "train_loss", "elapsed"} <= set(point) for point in run["evaluations"])
        assert run["steps"][0]["lr"] == pytest.approx(run["values"]["lr"])


def test_a_finished_comparison_is_taken_from_its_files(made, monkeypatch):
    protocol, results = made
    monkeypatch.setattr(compare, "run_trial", None)
    check(TASK, protocol)
    assert compare.run(TASK, protocol, World()) == "finished"
    again = json.loads((Path(protocol.out) / "results.json").read_text())
    assert again["finals"] == results["finals"]


def test_an_interrupted_comparison_goes_on_where_it_was(tmp_path, monkeypatch):
    protocol = replace(PROTOCOL, out=str(tmp_path / "out"), seeds=1)
    made = []
    run_trial = trials.run_trial

    def interrupted(trial, recipe, splits, world, stop, tick):
        if len(made) == 4:
            stop.asked = True
        made.append(trial)
        return run_trial(trial, recipe, splits, world, stop, tick)

    monkeypatch.setattr(compare, "run_trial", interrupted)
    assert compare.run(TASK, protocol, World()) == "interrupted"
    assert not (tmp_path / "out/results.json").exists()
    kept = {path.name for path in (tmp_path / "out/trials").iterdir()}
    assert len(kept) == 4
    made.append(None)  # no more interruptions
    assert compare.run(TASK, protocol, World()) == "finished"
    assert len(made) == 6 + (7 + 7 + 4 - 4)


def test_two_ranks_choose_alike(tmp_path):
    protocol = replace(PROTOCOL, trials=2, seeds=1, out=str(tmp_path / "out"))

    def work(world):
        splits = TASK.data.load()
        if world.rank == 0:
            compare.open_folder(Path(protocol.out or ""), {}, overwrite=False)
        tuned = compare.tune(compare.Work(TASK, protocol, world, splits, compare.Stop()))
        return [chosen.values for chosen in tuned or []]

    first, second = run_threads(2, work)
    assert first == second
    assert len(first) == 2


def test_ranks_agree_on_what_rank_0_says():
    said = run_threads(3, lambda world: agree(world, [5 + world.rank, world.rank], torch.device("cpu")))
    assert said == [[5, 0]] * 3


def test_the_best_has_the_lowest_mean_loss_on_the_validation_images():
    def runs(*ends):
        return [{"evaluations": [{"accuracy": 2.0, "loss": 0.0}, {"accuracy": a, "loss": loss}]} for a, loss in ends]

    results = [runs((0.8, 0.1)), runs((0.9, 0.5)), runs((1.0, 0.3), (0.8, 0.5)), runs((0.9, None)), runs((1.0, 9.0))]
    assert ranking(results) == [0, 2, 1, 4, 3]


def test_a_grid_is_tried_whole_or_in_a_fixed_part():
    assert len(FIRST.points(6)) == 6
    part = FIRST.points(4)
    assert part == FIRST.points(4)
    assert len({tuple(point.values()) for point in part}) == 4
    with pytest.raises(ValueError, match="trials=7 but the grid of SGD has 6"):
        FIRST.points(7)


def test_values_at_the_end_of_their_range_are_named():
    assert FIRST.edges({"lr": 1.0, "momentum": 0.9}) == ["lr"]
    assert FIRST.edges({"lr": 0.1, "momentum": 0.9}) == []


def test_settings_take_the_values_of_a_point():
    assert FIRST.settings({"lr": 0.5, "momentum": 0.0}) == Sgd(lr=0.5, momentum=0.0)


def test_trials_that_differ_have_files_that_differ(tmp_path):
    point = {"lr": 0.1, "momentum": 0.9}
    all_trials = [
        Trial(FIRST, values, seed, steps, final)
        for values in (point, {**point, "lr": 0.2})
        for seed in (0, 1)
        for steps in (4, 2)
        for final in (False, True)
    ]
    assert len({trial.file(tmp_path) for trial in all_trials}) == len(all_trials)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trials": 0}, "trials=0"),
        ({"seeds": -1}, "seeds=-1"),
        ({"steps": 0}, "steps=0"),
        ({"batch": 0}, "batch=0"),
        ({"trials": 100}, "trials=100"),
        ({"contenders": ("nobody",)}, "'nobody'"),
        ({"held_out": 1.5}, "held_out=1.5"),
    ],
)
def test_impossible_protocols_are_refused_by_value(changes, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        check(TASK, replace(PROTOCOL, out=str(tmp_path / "out"), **changes))
    assert not (tmp_path / "out").exists()


def test_a_folder_with_another_plan_is_refused(made):
    protocol, _ = made
    with pytest.raises(ValueError, match="--overwrite"):
        check(TASK, replace(protocol, seeds=5))
    check(TASK, replace(protocol, seeds=5, overwrite=True))


def test_plans_are_equal_where_results_are_shared():
    assert plan_of(TASK, PROTOCOL) == plan_of(TASK, replace(PROTOCOL, out="elsewhere", overwrite=True))
    assert plan_of(TASK, PROTOCOL) != plan_of(TASK, replace(PROTOCOL, steps=5))


def test_the_baseline_is_always_among_those_compared():
    assert [contender.name for contender in TASK.chosen(("SP-NGD",))] == ["SGD", "SP-NGD"]
    assert [contender.name for contender in TASK.chosen(("SGD",))] == ["SGD"]


@pytest.mark.parametrize("name", sorted(tasks()))
def test_a_task_gives_every_contender_the_default_number_of_trials(name):
    task = find_task(name)
    for contender in task.contenders:
        assert len(contender.points(Protocol().trials)) == Protocol().trials
        assert all(hasattr(contender.base, name) for name in contender.space)
