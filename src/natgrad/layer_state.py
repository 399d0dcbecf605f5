"""One layer over time: its statistics, their inverses and their clocks.

A cell is a view. Every tensor lives in the optimizer's state of the layer's weight, under string keys and with
shapes that are fixed at construction, and is looked up there each time, because trainers replace that dictionary
when they load a checkpoint; clocks and dampings are read and written as `numbers` (stacks.py). For a statistic X:

    X           the statistic (averaged over time if asked for), at its holder
    X_before    the value before the last, where the staleness rule looks back, at its holder; nothing but that rule
                reads it, so its numbers are half as wide
    X_inverse   its damped inverse, at the layer's owner
    X_damping   the damping that the inverse was made with, on every rank; below 0: the inverse is to be made again
                with what X has become or another damping; 0: there is no inverse yet
    X_clock     [next step, interval, previous interval, refreshes], on every rank; a next step of 0 is at once
    X_budget    under a Budget, on every rank: the relative change of the last measurement, and what measuring takes on
                every rank, taking in and factoring at the holder (in operations, layers/op_cost.py)
    passes      under a Budget, on every rank: operations of a sample's forward and backward passes through the layer,
                and those for the gradient of its inputs

Symmetric matrices of some size are packed [b, numel] (`forms`, triangles.py); `square` unpacks them.

The owner has the layer's gradient and makes its step. It holds the statistics too, save where a layer is so large
that its statistics are inverted on several ranks at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natgrad.curvature.by_rows import ByRows
from natgrad.curvature.curvature import Curvature, Statistic
from natgrad.curvature.per_sample import Rows, Sample, scaled
from natgrad.generators import generator_on
from natgrad.layers.layer import Layer, at_least_single
from natgrad.linalg import mean_eigenvalue
from natgrad.refresh import History, NextInterval, Staleness
from natgrad.triangles import PackedForm, SymmetricSlabs, halves, slabs

DORMANT = 2**62  # a clock that waits until its layer is used
NARROW = {torch.float64: torch.float32, torch.float32: torch.bfloat16}
"""The type in which a value is kept that is only compared with: rounding changes a number by 0.2 % at most."""


class Held(NamedTuple):
    """A tensor that a rank holds of a statistic: its name, its shape as it is kept, its type, its rank."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rank: int


@dataclass(eq=False)
class LayerState:
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
    ema_decay: float = 0.0
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

    def belong_to(self, owner: int) -> None:
        """Give the whole layer to one rank."""
        self.owner, self.holders = owner, dict.fromkeys(self.holders, owner)
        vars(self).pop("split", None)

    def place_of(self, name: str) -> int:
        """The rank that certainly has the state called `name`."""
        return self.holders.get(name.removesuffix("_before"), self.owner)

    def allocate(self, state: dict, rank: int | None) -> None:
        """Make every tensor that `rank` will ever hold of this cell; None makes all that any rank holds."""
        if self.budgeted and self.statistics:
            state["passes"] = torch.zeros(2, dtype=torch.float64)
        for key in self.keys:
            if self.budgeted:
                state[f"{key}_budget"] = torch.zeros(4, dtype=torch.float64)
            state[f"{key}_clock"] = torch.tensor([0, 1, 1, 0])
            state[f"{key}_damping"] = torch.zeros((), dtype=torch.float64)
        device = self.layer.parameters[0].device
        for held in self.held():
            if rank in (None, held.rank):
                state[held.name] = torch.zeros(held.shape, dtype=held.dtype, device=device)

    def held(self) -> Iterator[Held]:
        """The tensors of fixed shapes that all ranks together hold of the statistics."""
        dtype = at_least_single(self.layer.parameters[0].dtype)
        for moment in self.statistics:
            if isinstance(moment, Rows):
                continue  # as large as the samples' places make them
            key, shape = moment.key, moment.shape(self.layer)
            packed = self._kept_shape(key, shape)
            yield Held(key, packed, dtype, self.holders[key])
            if self.staleness().looks_back > 1:
                yield Held(f"{key}_before", packed, NARROW[dtype], self.holders[key])
            inverse = f"{key}_inverse"
            yield Held(inverse, self._kept_shape(inverse, self.curvature.inverse_shape(shape)), dtype, self.owner)

    @cached_property
    def forms(self) -> dict[str, PackedForm]:
        """How statistics, their values before and their inverses are packed, where they are."""
        found: dict[str, PackedForm] = {}
        for moment in self.statistics:
            if isinstance(moment, Rows):
                continue
            key, shape = moment.key, moment.shape(self.layer)
            if not moment.symmetric or len(shape) != 3 or shape[1] != shape[2]:
                continue
            kept, multiplied = halves(shape[2]), slabs(shape[2])
            if kept is not None:
                found |= {key: kept, f"{key}_before": kept}
            if multiplied is not None and self.curvature.multiplies and self.curvature.inverse_shape(shape) == shape:
                found[f"{key}_inverse"] = multiplied
        return found

    def _kept_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        form = self.forms.get(name)
        return shape if form is None else (shape[0], form.numel)

    def square(self, name: str, value: Tensor | None = None) -> Tensor:
        """A statistic or an inverse with all entries, [b, n, n] or [b, n]: the state's, or `value` of its form."""
        kept, form = self.state()[name] if value is None else value, self.forms.get(name)
        return kept if form is None else form.unpack(kept)

    def packed(self, name: str, value: Any) -> Any:
        """A saved value as it is kept: squares, as earlier versions saved them, are packed."""
        form = self.forms.get(name)
        if form is None or not isinstance(value, Tensor) or value.shape[1:] != (form.n, form.n):
            return value
        return form.pack(value)

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
        generator = generator_on(rows["mean"].device, seed)
        gram, kept = curvature.digest(rows, self.layer.shape, generator)
        for name in self.row_names & state.keys():
            del state[name]
        state |= {f"{key}_{name}": value for name, value in kept.items()}
        state[key], state[f"{key}_inverse"] = gram, torch.zeros_like(gram)
        _, interval, previous, _ = self.clock(key)
        return gram, self.staleness().next(History((None, None), interval, previous, len(gram[0])))

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
        return min(self.ema_decay, refreshes / (refreshes + 1)) if refreshes else 0.0

    def next_interval(self, key: str, changes: Sequence[float | None], samples: int) -> NextInterval:
        """When to measure next, given by how much this measurement differs from past values."""
        _, interval, previous, _ = self.clock(key)
        told = [*changes, None, None]
        steps = self.staleness().next(History((told[0], told[1]), interval, previous, samples))
        return NextInterval(steps, 1.0 if told[0] is None else told[0])

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
        return used <= 0 or (
            abs(damping / used - 1) > self.curvature.damping_tolerance and not self.curvature.damps_at_apply
        )

    def trace(self, key: str) -> Tensor:
        """The mean eigenvalue of a statistic's blocks [b], at its holder."""
        return self.mean_eigenvalue(key, self.state()[key])

    def mean_eigenvalue(self, key: str, value: Tensor) -> Tensor:
        """The mean eigenvalue [b] of a statistic of this layer's form."""
        form = self.forms.get(key)
        return mean_eigenvalue(value) if form is None else form.mean_eigenvalue(value)

    def factor(self, name: str, value: Tensor) -> Any:
        """An inverse of this layer's form as the curvature multiplies by it: a tensor or slabs."""
        form = self.forms.get(name)
        return value if form is None else SymmetricSlabs(form, value)

    def kept(self, fresh: bool = False) -> dict[str, Any]:
        """What the curvature preconditions with. `fresh`: rows that were just measured, of all samples."""
        state = self.state()
        inverses = {key: self.factor(name := f"{key}_inverse", state[name]) for key in self.keys}
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
