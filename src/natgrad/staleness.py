"""When a statistic is measured again: pure decisions over how much it changed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple


class Memory(NamedTuple):
    """What is known of one statistic when it has just been measured again.

    `changes` are the relative Frobenius distances to the last and the one before (None where there was none);
    `interval` and `previous` the last two intervals; `samples` how many samples the statistic is worth: fewer than
    the step's where it was measured on a bounded number of rows (docs/math.md).
    """

    changes: tuple[float | None, float | None]
    interval: int
    previous: int
    samples: int


class Staleness(ABC):
    """Says after how many steps to measure again. `looks_back` is how many past values it compares with."""

    looks_back: int = 0

    @abstractmethod
    def next(self, memory: Memory) -> int:
        """Steps until the next measurement, at least 1."""


@dataclass(frozen=True)
class Every(Staleness):
    """Every `steps` steps, whatever happens."""

    steps: int

    def __post_init__(self):
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError(f"refresh={self.steps!r}: give a whole number of steps, 1 or more")

    def next(self, memory: Memory) -> int:
        return self.steps


@dataclass(frozen=True)
class Adaptive(Staleness):
    """SP-NGD's rule (section 4.3, Algorithm 2): longer while the statistic stands still, shorter when it moves.

    Unlike the last value: half the interval. Like the last only: the same. Like the last two: the sum of the last
    two intervals, as Fibonacci's numbers. Two values are alike when they differ by less than `tolerance` of the
    older one's Frobenius norm. The paper's 0.1 was used from 4,096 samples up; below, sampling noise alone is
    larger, so the tolerance grows as 1/sqrt(samples) from `at` samples down. `limit` caps the interval (ours: the
    rule as published stops measuring towards the end of a run).
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

    def next(self, memory: Memory) -> int:
        tolerance = self.tolerance * max(1.0, self.at / max(memory.samples, 1)) ** 0.5
        like_last, like_before = (c is not None and c < tolerance for c in memory.changes)
        if not like_last:
            steps = max(1, memory.interval // 2)
        elif not like_before:
            steps = memory.interval
        else:
            steps = memory.interval + memory.previous
        return steps if self.limit is None else min(steps, self.limit)
