"""The experiment on steps: equal budgets, counted steps, and tables that say what was found."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import seng


@pytest.mark.parametrize("method", seng.METHODS)
def test_every_method_has_as_many_settings_and_builds_them(method):
    build, settings = seng.METHODS[method]
    assert len(settings) == seng.TRIALS
    assert len({str(setting) for setting in settings}) == seng.TRIALS
    for setting in settings[:: seng.TRIALS - 1]:
        assert isinstance(build(torch.nn.Linear(2, 2), **setting), torch.optim.Optimizer)


def test_seeds_that_choose_do_not_judge():
    assert not set(seng.TUNING) & set(seng.FRESH)


def test_steps_are_counted_to_each_target():
    torch.manual_seed(0)
    model = seng.mlp()
    reached = seng.steps_to(model, torch.optim.Adam(model.parameters(), lr=0.02), 0, (2.0, 0.5))
    assert 1 <= reached[0] <= reached[1] < 30
    still = seng.steps_to(model, torch.optim.SGD(model.parameters(), lr=1e-9), 0, (0.5, 1e-9))
    assert still == [1, None]


def test_hopeless_runs_are_stopped(monkeypatch):
    monkeypatch.setattr(seng, "HOPELESS", (2, 1.5))
    model = seng.mlp()
    taken = []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    optimizer.register_step_post_hook(lambda *_: taken.append(1))
    assert seng.steps_to(model, optimizer, 0, (0.1,)) == [None]
    assert len(taken) == 2


def test_the_setting_with_the_fewest_steps_is_chosen_and_trials_are_remembered(tmp_path, monkeypatch):
    settings = [{"lr": lr} for lr in range(seng.TRIALS)]
    monkeypatch.setitem(seng.METHODS, "fake", (lambda model, lr: lr, settings))
    runs = []

    def steps_to(model, lr, seed, targets):
        runs.append((lr, seed))
        return [None if lr == 3 else 100 - lr + seed % 2 for _ in targets]

    monkeypatch.setattr(seng, "steps_to", steps_to)
    row = seng.study(seng.Trials(tmp_path), "MLP", "fake")
    assert row["chosen"] == {"lr": seng.TRIALS - 1}
    assert row["tuning"][3] == seng.LIMIT
    assert [lr for lr, seed in runs if seed in seng.FRESH] == [seng.TRIALS - 1] * 5
    count = len(runs)
    assert seng.study(seng.Trials(tmp_path), "MLP", "fake") == row
    assert len(runs) == count


def test_a_table_gives_medians_ranges_and_ratios():
    base = {"method": "SGD", "chosen": {"lr": 1}, "steps": [[4, 20, 30]] * 5}
    ours = {
        "method": "ours",
        "chosen": {"lr": 2},
        "steps": [[1, 8, None], [2, 9, None], [3, 10, None], [4, 11, 7], [5, 30, 9]],
    }
    lines = seng.table([base, ours]).splitlines()
    assert lines[-1] == "| ours | 3 (1-5) | 10 (8-30) | never (7-never) | 0.50 | lr 2 |"
    assert seng.middle(ours["steps"], 2) == math.inf
