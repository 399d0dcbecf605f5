"""What `natgrad compare` compares, as data: a task (data, network, batch, steps) and its contenders.

A contender is an optimizer's settings and the values among which its tuning may choose. A contender or task
is added by adding it to the lists below.
"""

import difflib
import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from natgrad.data import Digits, Source
from natgrad.models import Architecture, CifarResNet
from natgrad.train.optimizers import Settings, Sgd, SpNgd


@dataclass(frozen=True)
class Contender:
    """An optimizer, and the grid of values that its tuning may try."""

    name: str
    base: Settings
    space: Mapping[str, tuple[Any, ...]]
    share: float = 1.0
    """Share of the task's steps that it is tuned for."""

    def points(self, trials: int) -> list[dict[str, Any]]:
        """Return `trials` points of the grid; fewer than all are drawn at random, always the same."""
        grid = [dict(zip(self.space, values)) for values in itertools.product(*self.space.values())]
        if trials > len(grid):
            raise ValueError(f"trials={trials} but the grid of {self.name} has {len(grid)} points; lower --trials")
        return random.Random(0).sample(grid, trials) if trials < len(grid) else grid

    def settings(self, values: Mapping[str, Any]) -> Settings:
        """Return the optimizer's settings at a point of the grid."""
        return replace(self.base, **values)

    def edges(self, values: Mapping[str, Any]) -> list[str]:
        """Return the numbers whose chosen value ends their range: a wider grid might hold a better one."""
        ends = {name: (min(given), max(given)) for name, given in self.space.items() if _numbers(given)}
        return [name for name, pair in ends.items() if values[name] in pair]


@dataclass(frozen=True)
class Task:
    """One problem on which optimizers meet; the first contender is the baseline."""

    name: str
    about: str
    data: Source
    model: Architecture
    contenders: tuple[Contender, ...]
    steps: int
    batch_share: float
    """Size of a batch as a share of the training images."""

    def chosen(self, names: tuple[str, ...]) -> tuple[Contender, ...]:
        """Return the contenders of these names, the baseline always among them; all where none is named."""
        known = {contender.name: contender for contender in self.contenders}
        for name in names:
            if name not in known:
                raise ValueError(f"there is no contender {name!r} for {self.name}; choose among {', '.join(known)}")
        baseline, *others = self.contenders
        return (baseline, *(other for other in others if not names or other.name in names))


def _numbers(values: tuple[Any, ...]) -> bool:
    return len(values) > 2 and all(isinstance(value, int | float) for value in values)


SGD = Contender(
    "SGD",
    Sgd(nesterov=True),
    {"lr": (0.2, 0.4, 0.8, 1.6), "momentum": (0.8, 0.9, 0.95, 0.98)},
)

SP_NGD = Contender(
    "SP-NGD",
    SpNgd(),
    {"lr": (0.003, 0.006, 0.012, 0.025), "damping": (1e-4, 3e-4, 1e-3, 3e-3)},
    share=0.5,
)

DIGITS = Task(
    name="digits",
    about="scikit-learn's digits on ResNet-8, batch a third of the training images, 24 steps",
    data=Digits(),
    model=CifarResNet(depth=8, widths=(16, 32, 64)),
    contenders=(SGD, SP_NGD),
    steps=24,
    batch_share=1 / 3,
)


def tasks() -> dict[str, Task]:
    """Return all tasks by name."""
    return {task.name: task for task in (DIGITS,)}


def find_task(name: str) -> Task:
    """Return a task; raise ValueError with near misses."""
    known = tasks()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"choose among {', '.join(known)}"
        raise ValueError(f"there is no task {name!r}; {hint}")
    return known[name]
