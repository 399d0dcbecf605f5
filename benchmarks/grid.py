"""A grid of values of an optimizer's settings, for experiments with few numbers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from natgrad_lab.train.optimizers import Settings


@dataclass(frozen=True)
class Contender:
    """An optimizer, and the grid of values that its tuning may try."""

    name: str
    base: Settings
    space: Mapping[str, tuple[Any, ...]]

    def points(self, trials: int) -> list[dict[str, Any]]:
        """`trials` points of the grid; fewer than all are drawn at random, always the same."""
        grid = [dict(zip(self.space, values)) for values in itertools.product(*self.space.values())]
        if trials > len(grid):
            raise ValueError(f"trials={trials} but the grid of {self.name} has {len(grid)} points; try fewer")
        return random.Random(0).sample(grid, trials) if trials < len(grid) else grid

    def settings(self, values: Mapping[str, Any]) -> Settings:
        """The optimizer's settings at a point of the grid."""
        return replace(self.base, **values)

    def edges(self, values: Mapping[str, Any]) -> list[str]:
        """The numbers whose chosen value ends their range: a wider grid might hold a better one."""
        ends = {name: (min(given), max(given)) for name, given in self.space.items() if numbers(given)}
        return [name for name, pair in ends.items() if values[name] in pair]


def numbers(values: tuple[Any, ...]) -> bool:
    return len(values) > 2 and all(isinstance(value, int | float) for value in values)
