"""When a statistic is measured again: pure decisions over how much it changed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Adaptive", "Budget", "Every", "History", "NextInterval", "Staleness"]

__all__ = ["Adaptive", "Budget", "Every", "History", "NextInterval", "Staleness"]


class History(NamedTuple):
    """What is known of one statistic when it has just been measured again.

    `changes` are the relative Frobenius distances to the last and the one before (None where there was none);
    `interval` and `previous` the last two intervals; `samples` how many samples the statistic is worth: fewer than
    the step's where it was measured on a bounded number of rows (docs/math.md).
    """

    changes: tuple[float | None, float | None]
    interval: int
    previous: int
    samples: int


class NextInterval(NamedTuple):
    """What a holder tells all ranks of a fresh measurement: when to measure again, and by how much it has changed.

    `interval` is in steps; 0 says that the measurement could not be used. `change` is the relative Frobenius distance
    to the last value, 1 where it is larger or where nothing is compared.
    """

    interval: int
    change: float = 1.0

    def packed(self) -> int:
        """Both as one whole number above 0, the change to a thousandth; 0 for what could not be used."""
        change = round(LEVELS * min(self.change, 1.0))
        return min(self.interval, 2**52) * (LEVELS + 1) + change if self.interval else 0

    @classmethod
    def unpacked(cls, number: int) -> NextInterval:
        """The inverse of `packed`."""
        interval, change = divmod(number, LEVELS + 1)
        return cls(interval, change / LEVELS)


LEVELS = 1000  # that a change is told in


class Staleness(ABC):
    """Says after how many steps to measure again. `looks_back` is how many past values it compares with."""

    looks_back: int = 0

    @abstractmethod
    def next(self, memory: History) -> int:
        """Steps until the next measurement, at least 1."""


@dataclass(frozen=True)
class Every(Staleness):
    """Every `steps` steps, whatever happens."""

    steps: int

    def __post_init__(self):
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError(f"refresh={self.steps!r}: give a whole number of steps, 1 or more")

    def next(self, memory: History) -> int:
        return self.steps


@dataclass(frozen=True)
class Adaptive(Staleness):
    """SP-NGD's rule (section 4.3, Algorithm 2): longer while the statistic stands still, shorter when it moves.

    Unlike the last value: half the interval. Like the last only: the same. Like the last two: the sum of the last
    two intervals, as Fibonacci's numbers. Two values are alike when they differ by less than `tolerance` of the
    older one's Frobenius norm. The paper's 0.1 was used from 4,096 samples up; below, sampling noise alone is
    larger, so the tolerance grows. `limit` is ours: the rule as published stops measuring towards the end of a run.

    Args:
        tolerance: relative change of a statistic that counts as a change, where `at` samples or more are measured.
        at: measured samples below which `tolerance` grows as 1/sqrt(samples), for sampling noise; 1: it never does.
        limit: the longest interval in steps; None: no limit.

    """

    tolerance: float = 0.1
    at: int = 4096
    limit: int | None = None
    looks_back = 2

    def __post_init__(self):
        if not self.tolerance > 0:
            raise ValueError(f"Adaptive(tolerance={self.tolerance}): give a relative change above 0, such as 0.1")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"Adaptive(limit={self.limit}): give the longest interval in steps, or None")

    def next(self, memory: History) -> int:
        tolerance = self.tolerance * max(1.0, self.at / max(memory.samples, 1)) ** 0.5
        like_last, like_before = (c is not None and c < tolerance for c in memory.changes)
        if not like_last:
            steps = max(1, memory.interval // 2)
        elif not like_before:
            steps = memory.interval
        else:
            steps = memory.interval + memory.previous
        return steps if self.limit is None else min(steps, self.limit)


@dataclass(frozen=True)
class Budget(Staleness):
    """Another rule, `then`, under a limit: measuring and factoring take at most `share` of a step.

    `then` says when a statistic is due; a whole number of steps is Every(steps). What is due and does not fit in a step
    waits for the next ones (budget.py has the order). The limit is counted in operations, not in seconds, so all ranks
    decide alike: a step's forward and backward passes on one rank against what measuring takes on every rank and
    factoring on the busiest one. What is larger than the limit is done alone, and its steps are paid back before
    anything else is done. A first measurement has no limit.

    Args:
        share: share of a step that measuring and factoring may take, counted in operations; what is due and does not
            fit waits.
        then: says when a statistic is due: a Staleness, or a whole number of steps.

    """

    share: float = 0.05
    then: int | Staleness = Adaptive()

    def __post_init__(self):
        number = isinstance(self.share, (int, float)) and not isinstance(self.share, bool)
        if not number or not 0 < self.share < math.inf:
            raise ValueError(f"Budget(share={self.share!r}): give a share of a step above 0, such as 0.05")
        if isinstance(self.then, Budget):
            raise ValueError(f"Budget(then={self.then}): one budget is for all; give Adaptive() or a number of steps")
        _ = self.rule  # refuses what is no number of steps

    @property
    def rule(self) -> Staleness:
        """`then` as a rule."""
        return self.then if isinstance(self.then, Staleness) else Every(self.then)

    @property
    def looks_back(self) -> int:  # type: ignore[override]
        return self.rule.looks_back

    def next(self, memory: History) -> int:
        return self.rule.next(memory)
