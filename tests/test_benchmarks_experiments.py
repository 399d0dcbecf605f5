"""The experiments' pure parts: what is remembered, what is chosen, and what the tables say."""

import json
import sys
from pathlib import Path

import pytest

from natgrad_lab.train.optimizers import Sgd, SpNgd

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import defaults
import longrun
import study


def trial(accuracy, lr=0.1, loss=1.0, seed=1):
    numbers = {"accuracy": accuracy, "loss": loss, "train_loss": 0.5, "refreshed": 0.25}
    return {"values": {"lr": lr}, "seed": seed, "step_ms": 10.0, "mean_step_ms": 12.0, **numbers}


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


def told(*accuracies):
    """A case's rows: two choices at two rates."""
    names = ("one", "two")
    rows = [
        {"choice": name, "lr": lr, "accuracy": accuracies[2 * k + j], "loss": 1.0}
        for k, name in enumerate(names)
        for j, lr in enumerate((0.03, 0.1))
    ]
    return {"rows": rows}


def test_what_is_least_behind_at_one_rate_for_all_cases_comes_first():
    cases = [{"case": "a", **told(0.5, 0.6, 0.55, 0.7)}, {"case": "b", **told(0.9, 0.8, 0.85, 0.65)}]
    assert defaults.behind(cases)["two", 0.1] == pytest.approx([0.0, 25.0])
    lines = defaults.table({"cases": cases}).splitlines()
    assert lines[0] == "| choice | a | b | mean behind, at lr | worst |"
    assert lines[2] == "| one | 50.0 / 60.0 | 90.0 / 80.0 | 10.0, 0.03 or 0.1 | 20.0, 10.0 |"
    assert lines[3] == "| two | 55.0 / 70.0 | 85.0 / 65.0 | 10.0, 0.03 | 15.0 |"


def test_seeds_of_a_case_are_averaged_in_its_column_and_judged_one_by_one():
    cases = [{"case": "a", **told(0.5, 0.6, 0.55, 0.7)}, {"case": "a", **told(0.9, 0.8, 0.85, 0.65)}]
    lines = defaults.table({"cases": cases}).splitlines()
    assert lines[0] == "| choice | a | mean behind, at lr | worst |"
    assert lines[2] == "| one | 70.0 / 70.0 | 10.0, 0.03 or 0.1 | 20.0, 10.0 |"
    assert lines[3] == "| two | 70.0 / 67.5 | 10.0, 0.03 | 15.0 |"


def test_a_choice_runs_as_natgrad_compare_would_run_it(tmp_path, monkeypatch):
    """The trials are the comparison's own, made once, and judged on samples held out of training."""
    monkeypatch.setattr(defaults, "steps_of", lambda task, batch: 2)
    wanted = defaults.trials({"one": SpNgd(refresh=1)}, "digits", 64, seed=7)
    assert {trial.seed for trial in wanted} == {7}
    rows = defaults.make(wanted, "digits", "", tmp_path, workers=1)
    assert [(row["choice"], row["lr"]) for row in rows] == [("one", lr) for lr in defaults.RATES]
    (path, *_), count = sorted((tmp_path / "trials").iterdir()), len(defaults.RATES)
    assert len(list((tmp_path / "trials").iterdir())) == count
    assert json.loads(path.read_text())["of"] == 1197  # of 1,437
    monkeypatch.setattr(defaults.Workers, "submit", lambda *_: pytest.fail("made twice"))
    assert defaults.make(wanted, "digits", "", tmp_path, workers=1) == rows


def test_the_table_of_the_long_run_compares_seed_by_seed():
    def entry(name, *accuracies):
        finals = [trial(accuracy, seed=seed) for seed, accuracy in enumerate(accuracies, start=1)]
        return {"name": name, "chosen": {"lr": 0.1}, "at_edge": [], "finals": finals}

    contenders = [entry("default", 0.70, 0.80), entry("every step", 0.72, 0.80)]
    told = longrun.table({"steps": 8, "damping": 1e-3, "length": "plain", "contenders": contenders})
    assert "8 steps, damping 0.001, length plain, seeds 1 2" in told
    assert "| default | 0.1 | 0.7500 (0.7000 to 0.8000) | 0 |" in told
    assert "| +1.00 ± 1.00 | 0.5 (0.5 to 0.5) | 10 | 12 | 25% |" in told
