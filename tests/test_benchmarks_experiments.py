"""The experiments' pure parts: what is remembered, what is chosen, and what the tables say."""

import json
import sys
from pathlib import Path

import pytest

from natgrad.train.optimizers import Sgd

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import lengths
import longrun
import study
from grid import Contender

GRID = Contender("SGD", Sgd(), {"lr": (0.03, 0.1, 0.3, 1.0), "momentum": (0.8, 0.9, 0.95)})


def trial(accuracy, lr=0.1, loss=1.0, seed=1):
    numbers = {"accuracy": accuracy, "loss": loss, "train_loss": 0.5, "refreshed": 0.25}
    return {"values": {"lr": lr}, "seed": seed, "step_ms": 10.0, "mean_step_ms": 12.0, **numbers}


class Told:
    """A study whose validation loss is smallest at one learning rate, and that remembers what it was asked."""

    def __init__(self, best):
        self.task, self.best, self.asked = study.tasks("")["digits"], best, []

    def trial(self, optimizer, seed, judged_on, length):
        self.asked.append((optimizer.lr, optimizer.momentum, seed, judged_on, length))
        return {**trial(0.5, loss=abs(optimizer.lr - self.best) + abs(optimizer.momentum - 0.9))}

    def say(self, text):
        pass


def test_a_trial_is_made_once_and_remembered_by_its_settings(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(study, "outcome", lambda job: made.append(job.recipe.seed) or trial(0.5))
    work = study.Study(study.tasks("")["digits"], tmp_path)
    for seed in (1, 2, 1):
        work.trial(Sgd(), seed, "test", 2)
    work.trial(Sgd(), 1, "validation", 2)
    work.trial(Sgd(momentum=0.5), 1, "test", 2)
    assert made == [1, 2, 1, 1]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_real_trial_keeps_a_few_plain_numbers(tmp_path):
    work = study.Study(study.tasks("")["digits"], tmp_path)
    result = work.trial(Sgd(lr=0.3), 1, "validation", 2)
    assert 0 <= result["accuracy"] <= 1
    assert result["settings"]["batch"] == 399  # a third of 1,437 images less a sixth
    assert result["refreshed"] is None
    assert result["train_loss"] > 0
    assert len(json.dumps(result)) < 2000


def test_where_data_lie_decides_nothing():
    recipes = [
        study.tasks(path)["cifar100-small"].recipe(Sgd(), seed=1, length=4, samples=1500) for path in ("here", "there")
    ]
    assert study.plain_values(recipes[0]) == study.plain_values(recipes[1])
    assert "here" not in json.dumps(study.plain_values(recipes[0]))
    assert recipes[0].batch == 375


def test_a_task_without_data_is_skipped_with_one_line(tmp_path, monkeypatch, capsys):
    arguments = ["x", "--data", str(tmp_path), "--out", str(tmp_path), "--tasks", "cifar100-small"]
    monkeypatch.setattr(sys, "argv", arguments)
    study.main("nothing", None, run=lambda work: pytest.fail("must not run"), table=str)
    told = capsys.readouterr()
    assert "cifar100-small is skipped" in told.err
    assert len(told.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_digits_for_choosing_are_not_those_for_the_report():
    task = study.tasks("")["digits"]
    assert (len(task.splits("test").train), len(task.splits("test").test)) == (1437, 360)
    assert len(task.splits("validation").train) + len(task.splits("validation").test) == 1437


def test_tuning_goes_past_an_end_that_was_chosen_and_stops_there():
    work = Told(best=3.0)
    early, late = lengths.tune(work, GRID)
    assert min(late, key=study.merit)["values"] == {"lr": 3.0, "momentum": 0.9}
    assert {trial["values"]["lr"] for trial in early} == {0.03, 0.1, 0.3, 1.0, 3.0, 9.0}
    assert {asked[3:] for asked in work.asked} == {("validation", 12), ("validation", 24)}


def test_a_choice_within_its_range_is_not_widened():
    early, late = lengths.tune(Told(best=0.3), GRID)
    assert (len(early), len(late)) == (12, lengths.FINALISTS)


def test_a_range_has_two_ends():
    known = [{"lr": lr, "damping": damping} for lr in (0.01, 0.03) for damping in (1e-4, 1e-3)]
    assert lengths.beyond(GRID, {"lr": 0.01, "damping": 1e-3}, known) == {
        "lr": {"lr": 0.00333, "damping": 1e-3},
        "damping": {"lr": 0.01, "damping": 1e-2},
    }


def test_width_is_the_range_of_rates_within_two_points_of_the_best():
    trials = [trial(0.60, 0.01), trial(0.69, 0.03), trial(0.40, 0.03), trial(0.70, 0.1), trial(0.67, 0.3)]
    by_rate = lengths.margin(trials, "lr")
    assert by_rate == {0.01: 0.60, 0.03: 0.69, 0.1: 0.70, 0.3: 0.67}
    assert lengths.width(by_rate) == "0.03 to 0.1 (3x)"
    assert lengths.margin(trials, "damping") == {}


def test_the_table_of_lengths_puts_the_best_first_and_a_loss_that_is_no_number_as_none():
    def entry(name, *accuracies):
        finals = [trial(accuracy) for accuracy in accuracies]
        return {"name": name, "chosen": {"lr": 0.1}, "at_edge": ["lr"], "early": [trial(0.5)], "finals": finals}

    worse, better = entry("worse", 0.5, 0.6), entry("better", 0.7, 0.8)
    worse["finals"][0]["train_loss"] = None
    told = lengths.table({"contenders": [worse, better]}).splitlines()
    assert told[2].startswith("| better | 0.700 0.800 | 0.750 | 0.5 0.5 | lr 0.1 | lr |")
    assert "| - 0.5 |" in told[3]


def test_one_setting_for_all_tasks_is_the_least_behind_on_the_mean():
    def result(task, **accuracies):
        early = [trial(accuracies["low"], 0.1), trial(accuracies["high"], 0.3), trial(0.1, accuracies["own"])]
        return {"task": task, "contenders": [{"name": "one", "early": early}]}

    told = lengths.together([result("a", low=0.9, high=0.8, own=1.0), result("b", low=0.5, high=0.7, own=2.0)])
    assert told.splitlines()[0] == "| | setting | points behind on a, b | mean |"
    assert told.splitlines()[2:] == ["| one | lr 0.3 | 10.0, 0.0 | 5.0 |"]


def test_the_table_of_the_long_run_compares_seed_by_seed():
    def entry(name, *accuracies):
        finals = [trial(accuracy, seed=seed) for seed, accuracy in enumerate(accuracies, start=1)]
        return {"name": name, "chosen": {"lr": 0.1}, "at_edge": [], "finals": finals}

    contenders = [entry("default", 0.70, 0.80), entry("every step", 0.72, 0.80)]
    told = longrun.table({"steps": 8, "damping": 1e-3, "length": "plain", "contenders": contenders})
    assert "8 steps, damping 0.001, length plain, seeds 1 2" in told
    assert "| default | 0.1 | 0.7500 (0.7000 to 0.8000) | 0 |" in told
    assert "| +1.00 ± 1.00 | 0.5 (0.5 to 0.5) | 10 | 12 | 25% |" in told


@pytest.mark.parametrize("task", ["digits", "cifar100-small"])
def test_all_contenders_of_lengths_have_grids_of_the_same_size(task):
    assert {len(contender.points(12)) for contender in lengths.contenders(task)} == {12}
    assert len({contender.name for contender in lengths.contenders(task)}) == len(lengths.contenders(task))
