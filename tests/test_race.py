"""Who is far behind: progress against the leader's, known when everybody has reported."""

import math

import pytest

from natgrad_lab.compare.race import Race, Standing, far_behind


def test_progress_is_measured_from_an_even_guess():
    start = math.log(100)
    losses = [start - 2.0, start - 1.21, start - 1.19, start + 0.5, math.inf]
    assert far_behind(losses, 100, 0.6) == [False, False, True, True, True]


@pytest.mark.parametrize("losses", [[math.inf, math.inf], [5.0, 6.0]])
def test_nobody_is_far_behind_where_nobody_has_made_progress(losses):
    assert far_behind(losses, 100, 0.6) == [False, False]


def test_all_are_answered_when_the_last_one_has_joined():
    asked = []

    def decide(standings):
        asked.append([standing.contender for standing in standings])
        return [standing.runs[0] > 1 for standing in standings]

    race = Race(3, decide)
    futures = [race.join(Standing(name, 64, [runs])) for name, runs in (("a", 1), ("b", 2))]
    assert not any(future.done() for future in futures)
    futures.append(race.join(Standing("c", 64, [0])))
    assert [future.result() for future in futures] == [False, True, False]
    assert asked == [["a", "b", "c"]]
