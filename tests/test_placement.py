"""Owners: balanced, the same on every rank, never worse than 4/3 of the best."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from natgrad.parallel import place

costs_of = st.lists(st.floats(0, 1e6), max_size=8)
relaxed = settings(deadline=None, derandomize=True)


def busiest(costs, owners, ranks):
    loads = [0.0] * ranks
    for cost, owner in zip(costs, owners):
        loads[owner] += cost
    return max(loads)


@relaxed
@given(costs_of, st.integers(1, 4))
def test_every_item_has_an_owner_and_the_busiest_is_near_the_best(costs, ranks):
    owners = place(costs, ranks)
    assert len(owners) == len(costs)
    assert all(0 <= owner < ranks for owner in owners)
    assert owners == place(list(costs), ranks)
    best = min(
        (busiest(costs, choice, ranks) for choice in itertools.product(range(ranks), repeat=min(len(costs), 5))),
        default=0.0,
    )
    if len(costs) <= 5:
        assert busiest(costs, owners, ranks) <= best * (4 / 3) + 1e-6


@relaxed
@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=60), st.integers(1, 9))
def test_the_bound_of_graham(costs, ranks):
    least = max(max(costs), sum(costs) / ranks)
    assert busiest(costs, place(costs, ranks), ranks) <= 2 * least


def test_the_dearest_comes_first_and_ties_go_low():
    assert place([1, 5, 3, 3], 2) == [0, 0, 1, 1]
    assert place([1, 1, 1, 1], 2) == [0, 1, 0, 1]
    assert place([], 3) == []
    assert place([2, 2], 5) == [0, 1]


def test_layers_without_work_are_placed_too():
    assert set(place([0.0] * 6, 3)) <= {0, 1, 2}
