"""NLCG's benchmark: every method makes its steps, budgets are equal, and the rate is chosen on other seeds."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import nlcg

TASK = replace(nlcg.TASKS["mlp"], steps=3, sweep=(100, 101), fresh=(0, 1, 2))


@pytest.mark.parametrize("name", nlcg.METHODS)
def test_every_method_makes_its_steps(name, splits):
    method = nlcg.METHODS[name]
    found = nlcg.trial(TASK, method, "constant", method.rates()[len(method.rates()) // 2], 0, splits)
    assert 0 < found["loss"] < 10
    assert found == nlcg.trial(TASK, method, "constant", method.rates()[len(method.rates()) // 2], 0, splits)


def test_budgets_are_equal_and_seeds_fresh():
    tuned = [m for m in nlcg.METHODS.values() if m.low is not None]
    assert {len(m.rates()) for m in tuned} == {10}
    for task in nlcg.TASKS.values():
        assert not set(task.sweep) & set(task.fresh)
        assert set(task.methods) <= set(nlcg.METHODS)


def test_the_rate_is_that_of_the_least_median(monkeypatch):
    asked = []

    def trial(task, method, schedule, lr, seed, splits):
        asked.append((lr, seed))
        return {"loss": math.inf if lr > 1 else abs(math.log2(lr) + 2) + 0.01 * seed, "accuracy": 50.0}

    monkeypatch.setattr(nlcg, "trial", trial)
    [row] = nlcg.study(TASK, nlcg.METHODS["NLCG faithful"], "authors", None)
    assert row["lr"] == 0.25
    assert [seed for lr, seed in asked[20:]] == [0, 1, 2]
    assert {lr for lr, _ in asked[20:]} == {0.25}
    text = nlcg.line({"task": "mlp", "schedule": "authors", "method": "NLCG faithful"}, row)
    assert "| 0.25 | 0.0100 [0.0000, 0.0200] | 50.0 |" in text
    [untuned] = nlcg.study(TASK, nlcg.METHODS["NLCG PR, curvature step"], "constant", None)
    assert not untuned["tuned"]


def test_batches_are_full_and_an_epoch_has_no_image_twice():
    found = nlcg.batches(nlcg.TASKS["mlp"], 1437, 0)
    assert [len(part) for part in found] == [359] * 40
    assert len(torch.cat(found[:4]).unique()) == 4 * 359
