"""Ranks that keep the others waiting are named, once."""

import pytest

from natgrad.parallel import run_threads
from natgrad_lab.train.stragglers import Stragglers, slower


def test_who_takes_twice_as_long_as_the_others():
    assert slower([1.0, 1.1, 0.9, 1.0]) == {}
    assert slower([1.0, 1.1, 2.6, 1.0]) == {2: pytest.approx(2.6)}
    assert slower([1.0, 3.0]) == {1: pytest.approx(3.0)}
    assert set(slower([1.0, 1.0, 1.0, 5.0, 6.0])) == {3, 4}
    assert slower([0.0, 0.0]) == {}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_straggler_is_told_once_by_rank_and_host(ranks):
    """Its seconds count for data and for passes, and not for messages, in which all wait for it."""

    def work(world):
        stragglers, told = Stragglers(world, every=3), []
        for _ in range(9):
            own = 0.3 if world.rank == 1 else 0.1
            told.append(stragglers.add({"data": own / 2, "network": own / 2, "messages": 5.0}))
        return told, dict(world.sent)

    for told, sent in run_threads(ranks, work):
        if ranks == 1:
            assert told == [{}] * 9
            assert not sent
            continue
        ((who, times),) = told[2].items()
        assert who.startswith("rank 1 on ")
        assert times == pytest.approx(3.0)
        assert told[:2] + told[3:] == [{}] * 8
