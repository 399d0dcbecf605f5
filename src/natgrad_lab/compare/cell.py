"""One contender at one size of batch: tuning in rounds, then final runs, as a sequence of requests for trials.

A cell is a generator: it yields the trials that it needs next, is sent their results, and returns what came of it. So
it knows nothing of who makes the trials, in which process, or whether they were remembered. Each budget is tuned for
by itself: all steps, and half of them where the plan says so. After the first round a cell may ask whether its
contender is far behind; then one point goes on.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from natgrad_lab.compare.contenders import Contender
from natgrad_lab.compare.protocol import Plan
from natgrad_lab.compare.race import Standing
from natgrad_lab.compare.tasks import Batch
from natgrad_lab.compare.trials import Trial

TUNING_SEEDS = (100, 101)
Rank = Callable[[list[list[Any]]], list[int]]
"""The places of points, best first, by the results of their runs."""
Cell = Generator[list[Trial] | list[Standing], list[Any], "Outcome"]


@dataclass(frozen=True)
class Tuned:
    """What tuning chose for a number of steps, and all that was tried for that number."""

    steps: int
    values: dict[str, Any]
    tried: list[Any]
    """(values, runs) of every point."""


@dataclass(frozen=True)
class Outcome:
    """What became of a contender at a size of batch."""

    contender: Contender
    batch: Batch
    tuned: list[Tuned]
    finals: list[Any]
    far_behind: bool = False
    """Whether the first round of tuning left the contender one point for the later ones."""


def cell(contender: Contender, batch: Batch, steps: int, plan: Plan, rank: Rank, ranks: int) -> Cell:
    """Tune a contender for each budget, or take its settings over; then run it with fresh seeds."""

    def trials(points: list[dict[str, Any]], count: int, seeds: tuple[int, ...], final: bool = False) -> list[Trial]:
        return [Trial(contender, point, batch, count, seed, final, ranks) for point in points for seed in seeds]

    far = False
    tuned: list[Tuned] = []
    if plan.transfer is not None:
        values = plan.transfer.values(contender, batch)
        tuned = [Tuned(count, values[min(n, len(values) - 1)], []) for n, count in enumerate(plan.budgets(steps))]
    else:
        found, far = yield from rounds(contender, batch, plan, steps, trials, rank)
        for count in plan.budgets(steps):
            tuned += yield from choose(found[count], count, 1 if far else plan.profile.finalists, trials, rank)
    seeds, finals = tuple(range(1, 1 + plan.profile.seeds)), []
    for one in tuned:
        finals += yield trials([one.values], one.steps, seeds, final=True)
    return Outcome(contender, batch, tuned, finals, far)


def rounds(contender: Contender, batch: Batch, plan: Plan, steps: int, trials: Any, rank: Rank) -> Any:
    """Try the points; return, by number of steps, the points with their runs, best first, and whether one went on."""
    points, far = contender.points(plan.profile.trials), False
    found: dict[int, list[Any]] = {}
    for turn, rung in enumerate(plan.rungs(steps)):
        points = points[: 1 if far else rung.points]
        results = yield trials(points, rung.steps, TUNING_SEEDS[:1])
        runs = [[result] for result in results]
        order = rank(runs)
        found[rung.steps] = [(points[place], runs[place]) for place in order]
        if turn == 0 and plan.profile.far_behind is not None:
            (far,) = yield [Standing(contender.name, batch, runs[order[0]])]
        points = [points[place] for place in order] if plan.profile.halving or far else points
    return found, far


def choose(found: list[Any], steps: int, finalists: int, trials: Any, rank: Rank) -> Any:
    """Try the best points again with other seeds and return the best of them."""
    best, others = found[:finalists], TUNING_SEEDS[1:]
    if len(best) == 1:
        return [Tuned(steps, best[0][0], found)]
    results = yield trials([point for point, _ in best], steps, others)
    share = len(others)
    again = [(point, runs + results[share * n : share * (n + 1)]) for n, (point, runs) in enumerate(best)]
    order = rank([runs for _, runs in again])
    return [Tuned(steps, again[order[0]][0], again + found[finalists:])]


def count_steps(plan: Plan, steps: int, far: bool = False) -> int:
    """Return how many steps all of a cell's trials make, those of a contender that is far behind or of another."""
    budgets = plan.budgets(steps)
    if plan.transfer is not None:
        return plan.profile.seeds * sum(budgets)
    first, *later = plan.rungs(steps)
    rungs = [first, *(rung._replace(points=1) if far else rung for rung in later)]
    last = {rung.steps: rung.points for rung in rungs}
    tuning = sum(rung.points * rung.steps for rung in rungs)
    best = {count: min(1 if far else plan.profile.finalists, last[count]) for count in budgets}
    again = sum(best[count] * count for count in budgets if best[count] > 1) * (len(TUNING_SEEDS) - 1)
    return tuning + again + plan.profile.seeds * sum(budgets)
