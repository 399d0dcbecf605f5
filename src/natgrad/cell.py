"""One layer over time: its statistics, their inverses and their clocks.

A cell is a view. Every tensor lives in the optimizer's state of the layer's weight, under string keys and with
shapes that are fixed at construction, and is looked up there each time, because trainers replace that dictionary
when they load a checkpoint; clocks and dampings are read and written as `numbers` (stacks.py). For a statistic X:

    X           the statistic (averaged over time if asked for), at its holder
    X_before    the value before the last, where the staleness rule looks back, at its holder
    X_inverse   its damped inverse, at the layer's owner
    X_damping   the damping that the inverse was made with, on every rank; below 0: the inverse is to be made again
                with what X has become or another damping; 0: there is no inverse yet
    X_clock     [next step, interval, previous interval, refreshes], on every rank; a next step of 0 is at once
    X_budget    under a Budget, on every rank: the relative change of the last measurement, and what measuring takes on
                every rank, taking in and factoring at the holder (in operations, layers/work.py)
    passes      under a Budget, on every rank: operations of a sample's forward and backward passes through the layer,
                and those for the gradient of its inputs

The owner has the layer's gradient and makes its step. It holds the statistics too, save where a layer is so large
that its statistics are inverted on several ranks at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from natgrad.curvature.base import Curvature, Statistic
from natgrad.curvature.by_rows import ByRows
from natgrad.curvature.rows import Rows, Sample, scaled
from natgrad.layers.base import Layer, at_least_single
from natgrad.linalg import mean_eigenvalue
from natgrad.staleness import Memory, Staleness, Told

DORMANT = 2**62  # a clock that waits until its layer is used


@dataclass(eq=False)
class Cell:
    """A layer, its curvature, its owner and the rank that holds each statistic.

    `state` finds the dictionary of the layer's weight; `numbers`, from the storage, are its clocks and dampings.
    """

    name: str
    layer: Layer
    curvature: Curvature
    owner: int
    holders: Mapping[str, int]
    state: Callable[[], dict]
    staleness: Callable[[], Staleness]
    decay: float = 0.0
    dim: int = 0  # of the samples in the layer's inputs
    budgeted: bool = False
    numbers: Any = None

    @cached_property
    def statistics(self) -> tuple[Any, ...]:
        """What is measured of the layer."""
        return tuple(self.curvature.statistics)

    @cached_property
    def keys(self) -> list[str]:
        """The statistics' names."""
        return [m.key for m in self.statistics]

    @cached_property
    def split(self) -> bool:
        """Whether other ranks than the owner hold statistics."""
        return any(holder != self.owner for holder in self.holders.values())

    def place_of(self, name: str) -> int:
        """The rank that certainly has the state called `name`."""
        return self.holders.get(name.removesuffix("_before"), self.owner)

    def allocate(self, state: dict, rank: int | None) -> None:
        """Make every tensor that `rank` will ever hold of this cell; None makes all that any rank holds."""
        if self.budgeted and self.statistics:
            state["passes"] = torch.zeros(2, dtype=torch.float64)
        for moment in self.statistics:
            key = moment.key
            if self.budgeted:
                state[f"{key}_budget"] = torch.zeros(4, dtype=torch.float64)
            state[f"{key}_clock"] = torch.tensor([0, 1, 1, 0])
            state[f"{key}_damping"] = torch.zeros((), dtype=torch.float64)
            if isinstance(moment, Rows):
                continue  # as large as the samples' places make them
            shape = moment.shape(self.layer)
            if rank in (None, self.holders[key]):
                state[key] = self.zeros(shape)
                if self.staleness().looks_back > 1:
                    state[f"{key}_before"] = self.zeros(shape)
            if rank in (None, self.owner):
                state[f"{key}_inverse"] = self.zeros(self.curvature.inverse_shape(shape))

    def zeros(self, shape: Sequence[int], device: str | None = None) -> Tensor:
        """Zeros in the statistics' precision, on the layer's device unless told otherwise."""
        weight = self.layer.parameters[0]
        dtype = at_least_single(weight.dtype)
        return torch.zeros(tuple(shape), dtype=dtype, device=device or weight.device)

    def clock(self, key: str) -> list[int]:
        return self.numbers[f"{key}_clock"]

    def set_clock(self, key: str, values: list[int]) -> None:
        self.numbers[f"{key}_clock"] = values

    @property
    def ready(self) -> bool:
        """Whether every statistic has been measured."""
        return all(self.clock(key)[3] > 0 for key in self.keys)

    @cached_property
    def by_rows(self) -> bool:
        """Whether the statistic is rows, whose tensors exist from the first measurement on."""
        return isinstance(self.curvature, ByRows)

    @cached_property
    def row_names(self) -> frozenset[str]:
        """The state that the last measurement of rows has left, as large as it made it."""
        if not isinstance(self.curvature, ByRows):
            return frozenset()
        (key,) = self.keys
        return frozenset({key, f"{key}_inverse", *(f"{key}_{name}" for name in self.curvature.stored)})

    def lost(self, rank: int) -> bool:
        """Whether this rank owns a curvature that has been measured, but was not in the state that it loaded.

        Rows are then missing; an inverse is zero, as it was made, which the inverse of a damped matrix never is.
        """
        if rank != self.owner or not self.keys or not self.ready:
            return False
        state = self.state()
        if self.by_rows:
            return self.keys[0] not in state
        return not all(bool(state[f"{key}_inverse"].any()) for key in self.keys)

    def forget(self) -> None:
        """Measure at the next step as if for the first time."""
        for key in self.keys:
            self.set_clock(key, [0, 1, 1, 0])

    def keep_rows(self, key: str, rows: Sample, share: float, seed: int) -> tuple[Tensor, int]:
        """Take in the rows of all ranks at the owner. Returns their matrix and the steps until the next ones.

        share: how many samples the layer saw of each of the step's; their gradients count as so many samples'.
        """
        curvature, state = self.curvature, self.state()
        if share != 1:
            rows = {**scaled(rows, share**0.5), "mean": rows["mean"] * share**0.5}
        assert isinstance(curvature, ByRows)
        generator = torch.Generator(rows["mean"].device).manual_seed(seed)
        gram, kept = curvature.digest(rows, self.layer.shape, generator)
        for name in self.row_names & state.keys():
            del state[name]
        state |= {f"{key}_{name}": value for name, value in kept.items()}
        state[key], state[f"{key}_inverse"] = gram, torch.zeros_like(gram)
        _, interval, previous, _ = self.clock(key)
        return gram, self.staleness().next(Memory((None, None), interval, previous, len(gram[0])))

    def due(self, step: int) -> tuple[Statistic, ...]:
        """The statistics to be measured in this step."""
        return tuple(m for m in self.statistics if self.clock(m.key)[0] <= step)

    def past(self, key: str) -> list[Tensor]:
        """The values that the staleness rule compares a fresh one with, the last one first."""
        state, refreshes = self.state(), self.clock(key)[3]
        found = [state[key], state.get(f"{key}_before")][: min(self.staleness().looks_back, refreshes)]
        return [value for value in found if value is not None]

    def kept_share(self, key: str) -> float:
        """The share of a statistic that stays when a fresh measurement comes: at first that of a plain mean."""
        refreshes = self.clock(key)[3]
        return min(self.decay, refreshes / (refreshes + 1)) if refreshes else 0.0

    def next_interval(self, key: str, changes: Sequence[float | None], samples: int) -> Told:
        """When to measure next, given by how much this measurement differs from past values."""
        _, interval, previous, _ = self.clock(key)
        told = [*changes, None, None]
        steps = self.staleness().next(Memory((told[0], told[1]), interval, previous, samples))
        return Told(steps, 1.0 if told[0] is None else told[0])

    def waited(self, key: str, step: int) -> int:
        """For how many steps a statistic has been due and was put off."""
        due = self.clock(key)[0]
        return max(0, step - due) if due > 0 else 0

    def arrive(self, key: str, step: int) -> None:
        """A statistic is measured in this step: where it had to wait, its interval has become as long as it was.

        So staleness rules hear how many steps really lie between two measurements.
        """
        if late := self.waited(key, step):
            _, interval, *rest = self.clock(key)
            self.set_clock(key, [step, interval + late, *rest])

    def advance(self, key: str, step: int, interval: int) -> None:
        """A statistic was measured in this step, to be measured again after `interval` steps; 0: it was unusable."""
        _, current, previous, refreshes = self.clock(key)
        if interval == 0:  # keep the old one, measure again at once
            self.set_clock(key, [step + 1, current, previous, refreshes])
        else:
            self.set_clock(key, [step + interval, interval, current, refreshes + 1])

    def spoil(self, key: str) -> None:
        """The inverse of a statistic is to be made again, in a later step."""
        if (used := self.numbers[f"{key}_damping"]) > 0:
            self.numbers[f"{key}_damping"] = -used

    def spoilt(self, key: str) -> bool:
        """Whether there is an inverse of a statistic that is to be made again."""
        return self.numbers[f"{key}_damping"] < 0

    def inverted(self, key: str) -> bool:
        """Whether there is an inverse of a statistic, however old."""
        return self.numbers[f"{key}_damping"] != 0

    def outdated(self, damping: float, fresh: set[str]) -> list[str]:
        """The statistics to be inverted again: fresh ones, and those inverted with a damping too far from this one.

        Every rank comes to the same list; none as long as some statistic of the layer has never been measured.
        """
        if self.curvature.joint or not all(k in fresh or self.clock(k)[3] > 0 for k in self.keys):
            return []
        return [k for k in self.keys if k in fresh or self._far(damping, self.numbers[f"{k}_damping"])]

    def _far(self, damping: float, used: float) -> bool:
        return used <= 0 or (abs(damping / used - 1) > self.curvature.telling and not self.curvature.redamps)

    def trace(self, key: str) -> Tensor:
        """The mean eigenvalue of a statistic's blocks [b], at its holder."""
        return mean_eigenvalue(self.state()[key])

    def kept(self, fresh: bool = False) -> dict[str, Tensor]:
        """What the curvature preconditions with. `fresh`: rows that were just measured, of all samples."""
        state = self.state()
        inverses = {key: state[f"{key}_inverse"] for key in self.keys}
        if isinstance(self.curvature, ByRows):
            for key in self.keys:
                inverses |= {n: v for n in self.curvature.stored if (v := state.get(f"{key}_{n}")) is not None}
            if fresh:
                inverses["fresh"] = torch.empty(0)
        return inverses

    def precondition(self, gradient: Tensor, damping: float, fresh: bool = False) -> Tensor:
        """The damped natural gradient of this layer, [b, o, i]."""
        return self.curvature.precondition(self.kept(fresh), gradient, damping)


def relative(change: float, norm: float) -> float:
    """A change as a share of what has changed; infinite against nothing."""
    return change / norm if norm > 0 else math.inf
