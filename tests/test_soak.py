"""Nothing grows: the short form of benchmarks/soak.py."""

import sys
import warnings
from pathlib import Path

import pytest

import natgrad

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import soak


@pytest.fixture(autouse=True)
def _few_looks(monkeypatch):
    monkeypatch.setattr(soak, "LOOKS", 4)  # each counts all tensors that there are


def test_optimizers_that_are_built_and_dropped_leave_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", natgrad.NatgradWarning)
        soak.built_and_dropped(len(soak.OPTIMIZERS))  # what torch keeps for itself is there now
        found = soak.built_and_dropped(3 * len(soak.OPTIMIZERS))
    assert found["left"] == 0
    assert found["hooks"] == 0
    assert abs(found["rises"]["tensors"]["rise"]) < 5


def test_many_optimizers_on_parts_of_one_model_take_the_steps_of_one():
    found = soak.side_by_side(20)
    assert found["apart"] == 0
    assert found["preconditioned"] == 20
    assert found["hooks"] == 0


def test_a_run_with_all_features_on_holds_no_more_at_its_end():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", natgrad.NatgradWarning)
        found = soak.long_run("SPNGD", 60)
    first, last = found["looks"][len(found["looks"]) // 2], found["looks"][-1]
    assert last["tensors"] <= first["tensors"] + 10
    assert last["hooks"] <= 40


def test_the_slope_of_a_line_is_found():
    rise, error = soak.slope([3.0, 5.0, 7.0, 9.0])
    assert rise == pytest.approx(6)
    assert error == pytest.approx(0, abs=1e-9)
