"""Schedules against the numbers of SP-NGD (its Table 2) and against their own definitions."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natgrad_lab.schedules import Constant, Cosine, DampingWarmUp, Exponential, Piecewise, Polynomial, Product, WarmUp

# batch: power, begin, end, epochs trained, learning rate at the stop over that at the start
TABLE = {
    "4K": (11.0, 1, 53, 35, 8.6e-6),
    "8K": (8.0, 1, 53.5, 35, 2.4e-4),
    "16K": (8.0, 1, 53.5, 35, 2.4e-4),
    "32K": (3.5, 1.5, 49.5, 45, 2.5e-4),
    "65K": (2.9, 2, 64.5, 60, 4.9e-4),
    "131K": (2.9, 3, 100, 90, 1.4e-3),
}


@pytest.mark.parametrize("batch", TABLE)
def test_polynomial_ends_where_the_paper_does(batch):
    power, begin, end, stop, ratio = TABLE[batch]
    assert Polynomial(power, begin, end)(stop) == pytest.approx(ratio, rel=0.03)


@pytest.mark.parametrize("batch", TABLE)
def test_progress_may_be_a_fraction_of_the_run(batch):
    power, begin, end, stop, _ = TABLE[batch]
    inner = Polynomial(power, begin / stop, end / stop)
    assert inner(0.4) == pytest.approx(Polynomial(power, begin, end)(0.4 * stop), rel=1e-12)


def test_polynomial_is_flat_before_its_begin_and_zero_after_its_end():
    schedule = Polynomial(2.0, 1.0, 3.0)
    assert [schedule(t) for t in (0.0, 0.5, 1.0, 2.0, 3.0, 9.0)] == [1.0, 1.0, 1.0, 0.25, 0.0, 0.0]


def test_cosine_passes_through_its_half():
    assert Cosine()(0.0) == 1.0
    assert Cosine()(0.5) == pytest.approx(0.5)
    assert Cosine()(1.0) == pytest.approx(0.0, abs=1e-15)
    assert Cosine(final=0.1)(1.0) == pytest.approx(0.1)


def test_piecewise_changes_at_its_boundaries():
    schedule = Piecewise((0.5, 0.75), (1.0, 0.1, 0.01))
    assert [schedule(t) for t in (0.0, 0.49, 0.5, 0.74, 0.75, 2.0)] == [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]


def test_warm_up_rises_in_a_straight_line_and_then_is_the_other_schedule():
    schedule = WarmUp(Cosine(), length=0.2, start=0.5)
    assert schedule(0.0) == 0.5
    assert schedule(0.1) == pytest.approx(0.75 * Cosine()(0.1))
    assert schedule(0.2) == Cosine()(0.2)
    assert WarmUp(length=0.1)(0.05) == pytest.approx(0.5)


def test_exponential_falls_by_its_ratio_in_every_length():
    schedule = Exponential(0.9, 10)
    assert [schedule(t) for t in (0, 10, 20)] == pytest.approx([1, 0.9, 0.81])
    assert schedule(5) == pytest.approx(math.sqrt(0.9))
    with pytest.raises(ValueError, match="ratio=0 "):
        Exponential(0.0)
    with pytest.raises(ValueError, match="no length"):
        Exponential(0.9, 0.0)


def test_a_product_multiplies_two_schedules():
    schedule = Product(Polynomial(1.0), Piecewise((0.5,), (1.0, 0.1)))
    assert [schedule(t) for t in (0.25, 0.75)] == pytest.approx([0.75, 0.025])


@given(st.floats(0, 1), st.floats(0, 1))
def test_decays_never_rise(one, other):
    early, late = sorted((one, other))
    for schedule in (Constant(), Polynomial(3.5, 0.1, 1.1), Cosine(), Piecewise()):
        assert 0.0 <= schedule(late) <= schedule(early) <= 1.0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Polynomial(begin=1.0, end=1.0), "from 1 to 1"),
        (lambda: Polynomial(power=0.0), "power=0"),
        (lambda: Cosine(begin=2.0), "from 2 to 1"),
        (lambda: Piecewise((0.5,), (1.0,)), "1 values for 1 boundaries"),
        (lambda: Piecewise((0.5, 0.2), (1.0, 0.1, 0.01)), "must rise"),
        (lambda: WarmUp(length=0.0), "from 0 to 0"),
        (lambda: DampingWarmUp(length=0.0), "from 0 to 0"),
        (lambda: DampingWarmUp(ratio=0.5), "ratio=0.5 must be at least 1"),
        (lambda: DampingWarmUp(ratio=1000.0, steps=6), "steps=6 .* give more than 6"),
        (lambda: DampingWarmUp(steps=0), "steps=0"),
    ],
)
def test_impossible_schedules_are_refused_by_value(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_half_way_momentum_of_the_paper():
    """Equation 22: momentum falls with the learning rate; half-way through 32K it is 0.130."""
    power, begin, end, stop, _ = TABLE["32K"]
    assert 0.97 * Polynomial(power, begin, end)(stop / 2) == pytest.approx(0.130, abs=0.001)
    assert math.isclose(0.93 * Polynomial(2.9, 3, 100)(45), 0.18, abs_tol=0.005)


@pytest.mark.parametrize(("ratio", "steps"), [(100.0, 50), (1.0, 10), (2000.0, 7)])
def test_damping_warm_up_is_the_recursion_of_its_paper(ratio, steps):
    """lambda_t = (1 - c) lambda_(t-1) + c lambda_target, c = 2 log10(lambda_0 / lambda_target) / T_warmup."""
    target, run = 2.5e-4, 4 * steps
    schedule = DampingWarmUp(ratio, length=0.25, steps=steps)
    c, damping = 2 * math.log10(ratio) / steps, ratio * target
    for step in range(run):
        assert target * schedule(step / run) == pytest.approx(damping, rel=1e-9)
        damping = (1 - c) * damping + c * target


def test_damping_warm_up_ends_near_the_power_that_its_docstring_states():
    assert DampingWarmUp(100.0, length=0.1, steps=10_000)(0.1) == pytest.approx(1 + 99 / 100**0.8686, rel=1e-3)
