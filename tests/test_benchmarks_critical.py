"""The search behind critical batch sizes, on runs that are formulas."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import critical


def formula(most_samples, fewest_steps, best):
    """Steps of McCandlish et al. (2018, eq. 2.11), E / B + S, worse where the learning rate is not the best."""

    def run(name, batch, lr, seed, most):
        steps = (most_samples / batch + fewest_steps) * (1 + 0.2 * math.log2(lr / best(batch)) ** 2)
        return steps if steps <= most else math.inf

    return run


def rows_of(run, batches=critical.BATCHES):
    return list(critical.measured(run, "SGD", list(batches), (1, 2)))


def test_the_learning_rate_is_found_at_every_batch():
    run = formula(60_000, 60, lambda batch: 0.2 * 2 ** round(math.log2(batch / 250) / 2))
    for row in rows_of(run):
        assert row["lr"] == pytest.approx(0.2 * 2 ** round(math.log2(row["batch"] / 250) / 2))
        assert row["fresh"] == [row["tuning"]] * 2


def test_a_search_that_begins_far_off_goes_on_until_something_arrives():
    tried = []

    def run(name, batch, lr, seed, most):
        tried.append(lr)
        return 50.0 if lr <= 0.1 else math.inf

    lr, steps = critical.search(run, "SGD", 250, 0.4, 100)
    assert steps[lr] == 50
    assert lr <= 0.1
    assert len(tried) <= 2 * critical.MOST_LOST


def test_the_critical_batch_is_where_steps_are_a_fifth_above_linear():
    rows = rows_of(formula(60_000, 60, lambda batch: 0.2))
    size, seen = critical.critical(rows)
    # from 250, where S adds a quarter: 60,000 + 60 B = 1.2 (60,000 + 60 * 250)
    assert seen
    assert size == pytest.approx((1.2 * (60_000 + 60 * 250) - 60_000) / 60, rel=0.03)
    assert rows[-1]["batch"] < 50_000  # three times linear: larger batches would say nothing


def test_an_optimizer_that_scales_to_the_end_has_no_critical_batch_yet():
    rows = rows_of(formula(60_000, 0.01, lambda batch: 0.2))
    assert critical.critical(rows) == (50_000.0, False)
    assert "> 50,000" in critical.table(rows)


def test_results_that_are_not_there_yet_say_so(tmp_path):
    with pytest.raises(SystemExit, match="is not there yet: run the script without --show"):
        critical.read(tmp_path / "critical.json")
