"""The experiments' pure parts: what is remembered, what is chosen, and what the tables say."""

import json
import sys
from pathlib import Path

import pytest

from natgrad_lab.compare.contenders import Contender
from natgrad_lab.compare.space import Choice
from natgrad_lab.train.optimizers import Sgd, SpNgd

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import defaults
import longrun


def trial(accuracy, lr=0.1, loss=1.0, seed=1):
    numbers = {"accuracy": accuracy, "loss": loss, "train_loss": 0.5, "refreshed": 0.25}
    return {"values": {"lr": lr}, "seed": seed, "step_ms": 10.0, "mean_step_ms": 12.0, **numbers}


def contender(**options):
    return Contender("one", "natgrad", Sgd(lr=0.3, **options), {"lr": Choice((0.1, 0.3))})


def test_a_trial_is_made_once_and_remembered_by_its_settings(tmp_path, monkeypatch):
    made = []
    fake = {"values": {"lr": 0.3}, "seed": 1, "evaluations": [], "steps": [{"loss": 1.0, "seconds": 0.1}]}
    monkeypatch.setattr(longrun, "run_trial", lambda trial, *_: made.append((trial.seed, trial.batch)) or fake)
    work = longrun.Study(longrun.tasks("")["digits"], tmp_path)
    for seed in (1, 2, 1):
        work.trial(contender(), 0.3, seed, True, 2)
    work.trial(contender(), 0.3, 1, False, 2)
    work.trial(contender(momentum=0.5), 0.3, 1, True, 2)
    assert made == [(1, 479), (2, 479), (1, 399), (1, 479)]  # a third of 1,437 images, less a sixth for choosing
    assert len(list((tmp_path / "digits/trials").iterdir())) == 4


def test_a_real_trial_is_the_comparisons_and_a_few_plain_numbers_are_kept(tmp_path):
    work = longrun.Study(longrun.tasks("")["digits"], tmp_path)
    result = work.trial(contender(), 0.3, 1, False, 2)
    assert [one["step"] for one in result["evaluations"]] == [2]
    told = longrun.kept(result)
    assert 0 <= told["accuracy"] <= 1
    assert told["refreshed"] is None
    assert told["train_loss"] > 0
    assert set(told) == set(trial(0.5))


def test_the_rate_with_the_least_validation_loss_is_chosen(monkeypatch):
    def made(lr):
        evaluations = [{"accuracy": 0.5, "loss": abs(lr - 0.03)}] if lr < 0.1 else []  # the largest diverges
        steps = [{"loss": None, "seconds": 0.1}]
        return {"values": {"lr": lr}, "seed": 100, "evaluations": evaluations, "steps": steps}

    work = longrun.Study(longrun.tasks("")["digits"], Path())
    monkeypatch.setattr(longrun.Study, "trial", lambda self, one, lr, seed, final, steps: made(lr))
    found = longrun.choose(work, longrun.contenders("digits")[0], 2)
    assert found["chosen"] == {"lr": 0.03}
    assert found["at_edge"] == []
    assert [(one["values"]["lr"], one["loss"]) for one in found["tuning"]][-1] == (0.1, None)


def test_where_data_lie_decides_nothing(tmp_path):
    one, other = (longrun.tasks(path)["cifar100-small"] for path in ("here", "there"))
    asked = longrun.Trial(contender(), {"lr": 0.1, "schedule": "cosine", "warm_up": 0.0}, 375, 4, 1, True)
    assert asked.file(one, tmp_path) == asked.file(other, tmp_path)


def test_a_task_without_data_is_skipped_with_one_line(tmp_path, monkeypatch, capsys):
    arguments = ["x", "--data", str(tmp_path), "--out", str(tmp_path), "--tasks", "cifar100-small"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(longrun, "run", lambda *_: pytest.fail("must not run"))
    longrun.main()
    told = capsys.readouterr()
    assert "cifar100-small is skipped" in told.err
    assert len(told.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_committed_results_are_readable(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--show"])
    longrun.main()
    told = capsys.readouterr().out
    assert "### digits" in told
    assert "### cifar100-small" in told
    assert told.count("| every step, every row |") == 2


def test_digits_for_choosing_are_not_those_for_the_report():
    splits = longrun.Study(longrun.tasks("")["digits"], Path()).splits
    assert (len(splits[True].train), len(splits[True].test)) == (1437, 360)
    assert len(splits[False].train) + len(splits[False].test) == 1437


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
