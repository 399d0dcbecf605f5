"""One layer over time: its statistics, their inverses and their clocks.

A cell is a view. Every tensor lives in the optimizer's state of the layer's weight, under string keys and with
shapes that are fixed at construction, and is looked up there each time, because trainers replace that dictionary
when they load a checkpoint. For a statistic X:

    X           the statistic (averaged over time if asked for), at its owner
    X_inverse   its damped inverse, at its owner
    X_before    the value before the last, where the staleness rule looks back, at its owner
    X_damping   the damping that the inverse was made with, at its owner
    X_clock     [next step, interval, previous interval, refreshes], on every rank
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.curvature.base import Curvature, Moment
from natgrad.layers.base import Layer, promote
from natgrad.linalg import mean_eigenvalue
from natgrad.staleness import Memory, Staleness

DORMANT = 2**62  # a clock that waits until its layer is used
TELLING = 0.1  # a change of damping by more makes the inverse due


@dataclass(frozen=True)
class Cell:
    """A layer, its curvature and its owner. `state` finds the dictionary of the layer's weight."""

    name: str
    layer: Layer
    curvature: Curvature
    owner: int
    state: Callable[[], dict]
    staleness: Callable[[], Staleness]
    decay: float = 0.0

    def allocate(self, state: dict, mine: bool) -> None:
        """Make every tensor that a rank will ever hold of this cell, the owner (`mine`) or another."""
        weight = self.layer.parameters[0]
        for moment in self.curvature.statistics:
            key = moment.key
            state[f"{key}_clock"] = torch.tensor([0, 1, 1, 0])
            if not mine:
                continue
            shape, options = moment.shape(self.layer), {"dtype": promote(weight).dtype, "device": weight.device}
            state[key] = torch.zeros(shape, **options)
            state[f"{key}_inverse"] = torch.zeros(shape, **options)
            state[f"{key}_damping"] = torch.zeros((), dtype=torch.float64)
            if self.staleness().looks_back > 1:
                state[f"{key}_before"] = torch.zeros(shape, **options)

    def clock(self, key: str) -> list[int]:
        return self.state()[f"{key}_clock"].tolist()

    def set_clock(self, key: str, values: list[int]) -> None:
        self.state()[f"{key}_clock"] = torch.tensor(values)

    @property
    def ready(self) -> bool:
        """Whether every statistic has been measured."""
        return all(self.clock(m.key)[3] > 0 for m in self.curvature.statistics)

    def due(self, step: int) -> tuple[Moment, ...]:
        """The statistics to be measured in this step."""
        return tuple(m for m in self.curvature.statistics if self.clock(m.key)[0] <= step)

    def absorb(self, key: str, value: Tensor, samples: int) -> int:
        """Take in a fresh statistic at its owner. Returns the steps until the next one, 0 if the value is unusable."""
        state = self.state()
        _, interval, previous, refreshes = self.clock(key)
        last, before = state[key], state.get(f"{key}_before")
        kept = min(self.decay, refreshes / (refreshes + 1)) if refreshes else 0.0
        fresh = value.to(last) if kept == 0 else kept * last + (1 - kept) * value.to(last)
        staleness = self.staleness()
        older = [last if refreshes > 0 else None, before if refreshes > 1 else None] if staleness.looks_back else []
        norms = [norm for old in older if old is not None for norm in difference(fresh, old)]
        total, *numbers = torch.stack([value.sum().to(last), *norms]).tolist()  # the one time that the host waits
        if not math.isfinite(total):
            return 0
        changes = [relative(*pair) for pair in zip(numbers[::2], numbers[1::2])] + [None, None]
        if before is not None:
            before.copy_(last)
        last.copy_(fresh)
        return staleness.next(Memory((changes[0], changes[1]), interval, previous, samples))

    def factor(self, damping: float, fresh: set[str]) -> int:
        """Invert what is fresh, and what was made with a damping too far from this one. Returns the retries."""
        state, retries = self.state(), 0
        keys = [m.key for m in self.curvature.statistics]
        stale = [k for k in keys if k in fresh or _far(damping, state[f"{k}_damping"].item())]
        if not stale or not self.ready:
            return 0
        parts = self.curvature.split({k: mean_eigenvalue(state[k]) for k in keys}, damping)
        for key in stale:
            inverse, tries = self.curvature.factor(key, state[key], parts[key])
            state[f"{key}_inverse"].copy_(inverse)
            state[f"{key}_damping"].fill_(damping)
            retries += tries
        return retries

    def precondition(self, gradient: Tensor) -> Tensor:
        """The damped natural gradient of this layer, [b, o, i]."""
        state = self.state()
        inverses = {m.key: state[f"{m.key}_inverse"] for m in self.curvature.statistics}
        return self.curvature.precondition(inverses, gradient)


def difference(value: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """|value - old| and |old| in Frobenius norms (SP-NGD section 4.3.1)."""
    return torch.linalg.vector_norm(value - old), torch.linalg.vector_norm(old)


def relative(change: float, norm: float) -> float:
    """A change as a share of what has changed; infinite against nothing."""
    return change / norm if norm > 0 else math.inf


def _far(damping: float, used: float) -> bool:
    return used <= 0 or abs(damping / used - 1) > TELLING
