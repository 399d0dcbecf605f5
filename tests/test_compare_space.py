"""Declared spaces: seeded points that cover them evenly, the default first, and what lies on an edge."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natgrad_lab.compare.contenders import CONTENDERS, SCHEDULE, chosen
from natgrad_lab.compare.space import Choice, LogUniform, edges, points
from natgrad_lab.schedules import Cosine, Polynomial, WarmUp

SPACE = {"lr": LogUniform(0.01, 1.0), "momentum": Choice((0.8, 0.9, 0.95))}


@given(count=st.integers(1, 40), seed=st.text(max_size=5))
def test_one_number_lies_in_each_part_of_a_range(count, seed):
    found = points(SPACE, {"lr": 0.1, "momentum": 0.9}, count + 1, seed)
    assert found[0] == {"lr": 0.1, "momentum": 0.9}
    shares = sorted(math.log(one["lr"] / 0.01) / math.log(100) for one in found[1:])
    slack = 0.004  # numbers are rounded to three digits
    assert all(n / count - slack <= share <= (n + 1) / count + slack for n, share in enumerate(shares))
    seen = [one["momentum"] for one in found[1:]]
    assert max(map(seen.count, SPACE["momentum"].values)) - min(map(seen.count, SPACE["momentum"].values)) <= 1


def test_points_depend_on_the_seed_alone():
    first = {"lr": 0.1, "momentum": 0.9}
    assert points(SPACE, first, 9, "a") == points(SPACE, first, 9, "a")
    assert points(SPACE, first, 9, "a") != points(SPACE, first, 9, "b")
    assert points(SPACE, first, 1, "a") == [first]


def test_values_near_the_end_of_what_was_declared_are_named():
    assert edges(SPACE, {"lr": 0.012, "momentum": 0.9}) == ["lr"]
    assert edges(SPACE, {"lr": 0.9, "momentum": 0.95}) == ["lr", "momentum"]
    assert edges(SPACE, {"lr": 0.1, "momentum": 0.9}) == []
    assert edges({"decay": Choice((0.0, 0.01, 0.1))}, {"decay": 0.0}) == []  # off is no edge
    assert edges({"beta": Choice(("a", "b", "c"))}, {"beta": "c"}) == []
    assert edges({"warm": Choice((0.0, 0.1))}, {"warm": 0.1}) == []


def test_ranges_without_logarithm_are_refused():
    with pytest.raises(ValueError, match="from 0 to 1"):
        LogUniform(0.0, 1.0)


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda one: one.name)
def test_every_point_of_a_contender_is_settings_and_a_schedule(contender):
    found = contender.points(25)
    assert len({str(point) for point in found}) == 25
    for point in found:
        settings, schedule = contender.settings(point), contender.schedule(point)
        assert type(settings) is type(contender.base)
        assert settings.lr > 0
        assert 0 < schedule(0.0) <= 1
        assert schedule(1.0) < 0.01
    default = contender.settings(found[0])
    assert default.lr == contender.base.lr
    assert set(SCHEDULE) <= set(found[0])


def test_everyone_searches_a_space_of_like_size():
    sizes = {contender.name: len(contender.all_of()) for contender in CONTENDERS}
    assert max(sizes.values()) - min(sizes.values()) <= 2, sizes


def test_schedules_are_what_their_names_say():
    sgd = chosen(("SGD",))[0]
    point = sgd.points(1)[0]
    assert sgd.schedule(point) == Cosine()
    warm = sgd.schedule({**point, "schedule": "quadratic", "warm_up": 0.15})
    assert warm == WarmUp(Polynomial(2.0), length=0.15, start=0.1)


def test_contenders_are_named_in_any_case_and_near_misses_are_suggested():
    assert [one.name for one in chosen(("kfac", "SGD"))] == ["SGD", "KFAC"]
    assert len(chosen(())) == 15
    with pytest.raises(ValueError, match="did you mean SOAP"):
        chosen(("SOPA",))
    with pytest.raises(ValueError, match="choose among SGD, Nesterov"):
        chosen(("xyz",))
