"""The comparison: equal budgets, choice on held-out samples, taking up again, workers, ranks, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from natgrad.parallel import World, run_threads
from natgrad_lab.compare import protocol as rules
from natgrad_lab.compare import rounds as carry
from natgrad_lab.compare import trials, workers
from natgrad_lab.compare.protocol import Protocol, check, plan_of
from natgrad_lab.compare.space import LogUniform
from natgrad_lab.compare.tasks import Profile, Task
from natgrad_lab.compare.trials import Trial, agree, diverged, judged_at, learning, run_trial, some_of, train_loss
from natgrad_lab.data import Digits
from natgrad_lab.models import Mlp
from natgrad_lab.train.log import write_json
from natgrad_lab.train.loop import prepare
from natgrad_lab.train.optimizers import Sgd
from natgrad_lab.train.recipe import Recipe

SMALL = Profile(("Nesterov", "KFAC"), (100, "full"), trials=4, seeds=2, finalists=1)
TASK = Task(
    "tiny",
    "a test",
    Recipe(Digits(), Mlp((16,)), Sgd()),
    steps=((100, 8), (400, 4)),
    full=4,
    targets=(0.5,),
    profiles={"small": SMALL},
    points=4,
)


def made_in(folder, task=TASK, **changes):
    protocol = Protocol(out=str(folder), **changes)
    check(task, protocol)
    status = carry.run(task, protocol, World())
    return status, json.loads((folder / "results.json").read_text()) if status == "finished" else None


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "out"
    status, results = made_in(folder)
    assert status == "finished"
    return folder, results


def test_everyone_gets_the_same_trials_steps_and_seeds_at_every_size_of_batch(made):
    _, results = made
    cells = {(cell["contender"], cell["batch"]): cell for cell in results["cells"]}
    assert set(cells) == {(name, batch) for name in ("Nesterov", "KFAC") for batch in (100, "full")}
    for (_, batch), cell in cells.items():
        steps = 8 if batch == 100 else 4
        assert [budget["steps"] for budget in cell["budgets"]] == [steps, steps // 2]
        assert [len(budget["tried"]) for budget in cell["budgets"]] == [1, 2]
        assert cell["samples"] == (100 if batch == 100 else 1437)
        for budget in cell["budgets"]:
            assert [run["seed"] for run in budget["finals"]] == [1, 2]
            assert {len(run["losses"]) for run in budget["finals"]} == {budget["steps"]}


def test_final_runs_are_judged_along_the_way_and_record_their_code(made):
    _, results = made
    for cell in results["cells"]:
        budget = cell["budgets"][0]
        points = budget["finals"][0]["points"]
        assert [point[0] for point in points] == sorted(judged_at(budget["steps"], 4))
        assert points[-1][0] == budget["steps"]
        assert all(0 <= accuracy <= 1 for _, _, accuracy, _ in points)
        assert budget["finals"][0]["made_by"] == rules.made_by()
        assert budget["finals"][0]["train_loss"] > 0


def test_a_finished_comparison_is_taken_from_its_files(made, monkeypatch):
    folder, results = made
    monkeypatch.setattr(workers, "run_trial", None)
    assert made_in(folder)[1]["cells"] == results["cells"]


def test_more_optimizers_and_seeds_take_what_is_there(made, monkeypatch, tmp_path):
    folder, _ = made
    asked = []

    def counted(trial, *others):
        asked.append(trial)
        return run_trial(trial, *others)

    monkeypatch.setattr(workers, "run_trial", counted)
    _, more = made_in(folder, seeds=3, optimizers=("SGD", "Nesterov"))
    known = [trial for trial in asked if trial.contender.name == "Nesterov"]
    assert {(trial.final, trial.seed) for trial in known} == {(True, 3)}
    assert {cell["contender"] for cell in more["cells"]} == {"SGD", "Nesterov"}


def test_an_interrupted_comparison_goes_on_where_it_was(tmp_path, monkeypatch):
    count = []

    def interrupted(trial, task, splits, world, stop, tick):
        count.append(trial)
        return None if len(count) == 6 else run_trial(trial, task, splits, world, stop, tick)

    monkeypatch.setattr(workers, "run_trial", interrupted)
    small = {"optimizers": ("Nesterov",), "batch": (100,)}
    assert made_in(tmp_path, **small)[0] == "interrupted"
    assert not (tmp_path / "results.json").exists()
    assert len(list((tmp_path / "trials").iterdir())) == 5
    assert made_in(tmp_path, **small)[0] == "finished"
    assert len(count) == 1 + (4 + 2 + 1) + 4


def test_a_file_that_was_half_written_is_made_anew(tmp_path):
    small = {"optimizers": ("Nesterov",), "batch": (100,), "trials": 1, "seeds": 1}
    made_in(tmp_path, **small)
    path = next((tmp_path / "trials").glob("final-*"))
    path.write_text("{")
    assert made_in(tmp_path, **small)[0] == "finished"
    assert json.loads(path.read_text())["final"]


@pytest.mark.slow
def test_workers_make_what_one_process_makes(made, tmp_path):
    _, results = made
    status, others = made_in(tmp_path / "out", workers=2)
    assert status == "finished"

    def ends(some):
        return [
            (cell["contender"], cell["batch"], budget["values"], run["seed"], [p[2:] for p in run["points"]])
            for cell in some["cells"]
            for budget in cell["budgets"]
            for run in budget["finals"]
        ]

    for mine, theirs in zip(ends(results), ends(others)):
        assert mine[:4] == theirs[:4]
        assert torch.tensor(mine[4]).allclose(torch.tensor(theirs[4]), atol=2e-3)


def test_two_ranks_choose_alike(tmp_path):
    protocol = Protocol(out=str(tmp_path / "out"), batch=(100,), trials=2, seeds=1)

    def made_by_rank(world):
        chosen = []
        plan = plan_of(TASK, protocol)
        one = carry.Work(TASK, protocol, plan, world, carry.Stop())
        assert workers.drive(one.cells(), one.make, one.stopped, lambda outcome: chosen.append(outcome))
        return [(outcome.contender.name, [tuned.values for tuned in outcome.tuned]) for outcome in chosen]

    first, second = run_threads(2, made_by_rank)
    assert first == second
    assert [name for name, _ in first] == ["Nesterov", "KFAC"]


STILL = replace(TASK, spaces={"SGD": {"lr": LogUniform(1e-9, 1e-8)}}, firsts={"SGD": {"lr": 1e-9}})
"""SGD learns nothing here."""
RACE = {"optimizers": ("SGD", "KFAC"), "batch": (100,), "steps": 48, "far_behind": 0.5, "seeds": 2}


def points_tried(results):
    return {cell["contender"]: [len(budget["tried"]) for budget in cell["budgets"]] for cell in results["cells"]}


def test_an_optimizer_that_is_far_behind_gets_one_point_and_the_same_seeds(tmp_path, monkeypatch, capsys):
    _, results = made_in(tmp_path, STILL, **RACE)
    assert points_tried(results) == {"SGD": [1, 1], "KFAC": [1, 2]}
    assert {cell["contender"]: cell["far_behind"] for cell in results["cells"]} == {"SGD": True, "KFAC": False}
    assert all(len(budget["finals"]) == 2 for cell in results["cells"] for budget in cell["budgets"])
    said = capsys.readouterr().out
    assert "batch 100: far behind after the first round, one point goes on: SGD" in said
    assert "SGD*" in said
    monkeypatch.setattr(workers, "run_trial", None)
    assert made_in(tmp_path, STILL, **RACE)[1]["cells"] == results["cells"]
    assert len(list((tmp_path / "trials").iterdir())) == 4 + 4 + (1 + 1) + (2 + 1) + 2 * 2 * 2


def test_without_a_share_or_with_zero_everybody_goes_on_alike(tmp_path):
    small = {**RACE, "trials": 2, "seeds": 1, "steps": 4}
    tried = points_tried(made_in(tmp_path / "none", STILL, **{**small, "far_behind": None})[1])
    assert tried == points_tried(made_in(tmp_path / "zero", STILL, **{**small, "far_behind": 0.0})[1])
    assert tried["SGD"] == tried["KFAC"]


@pytest.mark.slow
def test_workers_find_the_same_one_far_behind(tmp_path):
    _, results = made_in(tmp_path, STILL, **RACE, workers=2)
    assert points_tried(results) == {"SGD": [1, 1], "KFAC": [1, 2]}


def test_two_ranks_find_the_same_one_far_behind(tmp_path):
    protocol = Protocol(out=str(tmp_path / "out"), **RACE)

    def made_by_rank(world):
        found = {}
        one = carry.Work(STILL, protocol, plan_of(STILL, protocol), world, carry.Stop())
        done = lambda outcome: found.update({outcome.contender.name: outcome.far_behind})  # noqa: E731
        assert workers.drive(one.cells(), one.make, one.stopped, done)
        return found

    assert run_threads(2, made_by_rank) == [{"SGD": True, "KFAC": False}] * 2


def test_settings_of_a_finished_comparison_are_run_without_tuning(made, tmp_path):
    _, results = made
    write_json(tmp_path / "there" / "results.json", results)
    given = {"settings": str(tmp_path / "there"), "settings_batch": 100}
    tmp_path = tmp_path / "here"
    _, taken = made_in(tmp_path, batch=("full",), seeds=1, **given)
    assert not list((tmp_path / "trials").glob("tuning-*"))
    assert taken["plan"]["settings"] == {"full": "tiny at batch 100"}
    chosen = {cell["contender"]: cell["budgets"][0]["values"] for cell in results["cells"] if cell["batch"] == 100}
    for cell in taken["cells"]:
        assert cell["budgets"][0]["values"] == chosen[cell["contender"]]
        assert cell["budgets"][0]["tried"] == []
    assert "none; settings at full of tiny at batch 100" in (tmp_path / "report.html").read_text()


def test_half_of_the_steps_may_be_left_out(tmp_path, capsys):
    _, results = made_in(tmp_path, optimizers=("Nesterov",), batch=(100,), trials=1, seeds=1, half=False)
    assert [budget["steps"] for budget in results["cells"][0]["budgets"]] == [8]
    assert "batch 100, 8 steps; goal" in capsys.readouterr().out


def test_a_run_is_judged_on_so_many_samples_of_each_split():
    splits = TASK.recipe.data.load()
    some = replace(TASK, judged=50)
    for final in (False, True):
        judged = learning(some, splits, final)
        assert len(judged.test) == 50
        assert torch.equal(judged.train.labels, learning(TASK, splits, final).train.labels)
    assert some_of(splits.test, 10_000) is some_of(splits.test, None) is splits.test
    assert torch.equal(some_of(splits.test, 3).labels, splits.test.labels[[0, 179, 359]])
    job = prepare(TASK.recipe, World(), splits)
    few = replace(job, splits=replace(splits, test=some_of(splits.train, 50)))
    assert train_loss(job, 50) == few.score().loss
    assert train_loss(job, None) == job.score("train").loss
    assert rules.task_values(some)["judged"] == 50
    assert "judged" not in rules.task_values(TASK)


def test_ranks_agree_on_what_rank_0_says():
    said = run_threads(3, lambda world: agree(world, [5 + world.rank, world.rank], torch.device("cpu")))
    assert said == [[5, 0]] * 3


def test_a_run_that_diverges_ends_early_and_counts():
    sgd = TASK.chosen(("SGD",))[0]
    values = {**sgd.points(1)[0], "lr": 1e30}
    result = run_trial(
        Trial(sgd, values, 100, 30, 0, True), TASK, TASK.recipe.data.load(), World(), bool, lambda s: None
    )
    assert result["diverged"] == len(result["steps"]) < 10
    assert result["evaluations"] == []
    assert result["train_loss"] is None
    assert not diverged([{"loss": None}])
    assert not diverged([{"loss": None}, {"loss": 1.0}])


def test_a_task_gives_steps_between_its_neighbours():
    assert [TASK.steps_of(batch) for batch in (1, 100, 200, 400, 9999, "full")] == [8, 8, 6, 4, 4, 4]


def test_places_of_judging_are_spread_and_end_with_the_run():
    assert judged_at(100, 4) == {25, 50, 75, 100}
    assert judged_at(3, 10) == {1, 2, 3}


def test_trials_that_differ_have_files_that_differ(tmp_path):
    sgd, kfac = TASK.chosen(("SGD", "KFAC"))
    point = sgd.points(1)[0]
    listed = [
        Trial(sgd, values, batch, steps, seed, final, ranks)
        for values in (point, {**point, "lr": 0.2}, {**point, "schedule": "linear"})
        for batch in (100, "full")
        for steps in (4, 2)
        for seed in (0, 1)
        for final in (False, True)
        for ranks in (1, 2)
    ]
    listed.append(Trial(kfac, kfac.points(1)[0], 100, 4, 0, False))
    assert len({trial.file(TASK, tmp_path) for trial in listed}) == len(listed)


def test_a_folder_of_something_else_or_of_other_code_is_refused(made, tmp_path, monkeypatch):
    folder, _ = made
    (tmp_path / "file").write_text("")
    for path, says in ((tmp_path, "something else.*--overwrite"), (tmp_path / "file", "is a file")):
        with pytest.raises(ValueError, match=says):
            check(TASK, Protocol(out=str(path)))
    with pytest.raises(ValueError, match="something else"):
        check(replace(TASK, held_out=0.3), Protocol(out=str(folder)))
    monkeypatch.setattr(rules, "made_by", lambda: {"commit": "another"})
    with pytest.raises(ValueError, match=r"another version or commit.*--reuse"):
        check(TASK, Protocol(out=str(folder)))
    check(TASK, Protocol(out=str(folder), reuse=True))
    check(TASK, Protocol(out=str(folder), overwrite=True))


def test_results_of_other_code_are_used_again_only_when_told(made, monkeypatch):
    path = next(Path(made[0] / "trials").iterdir())
    assert trials.remembered(path, reuse=False)
    monkeypatch.setattr(trials, "made_by", lambda: {"commit": "another"})
    assert trials.remembered(path, reuse=False) is None
    assert trials.remembered(path, reuse=True)
