"""What one step asks of every rank's device, stage by stage: lists of work, and who has to do it.

Passes and measurements are every rank's; factors, directions and updates are their owners'. Passes over weights that
rules make are counted here, since a rule is a few elementwise lines. What the host launches for all of it is counted
where the optimizer really steps (rehearsal.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from natgrad.budget import holder_work
from natgrad.curvature.curvature import Extent
from natgrad.curvature.per_sample_cost import RowForm
from natgrad.layer_state import LayerState
from natgrad.layers import UncurvedParameter
from natgrad.layers.op_cost import OpCost, moved
from natgrad.optim.conjugate import Conjugate
from natgrad_lab.plan.rehearsal import Rehearsal
from natgrad_lab.plan.trace import Trace

MOMENTUM, CONJUGATE, ADAM, PLAIN = 6.0, 26.0, 14.0, 5.0
"""Passes over the weights: momentum with its length and packing, a conjugate direction, Adam's, SGD's with momentum."""


@dataclass(frozen=True)
class Parts:
    """How a rank's share of a step goes through the network: traces, and how many passes each stands for."""

    passes: Sequence[tuple[Trace, int]]
    ranks: int

    @cached_property
    def seen(self) -> dict[str, Extent]:
        """What every layer sees in a step of all ranks."""
        found: dict[str, Extent] = {}
        for trace, count in self.passes:
            places: dict[str, int] = {}
            samples: dict[str, int] = {}
            for call in trace.calls:
                n, s = call.layer.count(call.x)
                places[call.name] = places.get(call.name, 0) + s
                samples[call.name] = n * count * self.ranks
            for name, n in samples.items():
                before = found.get(name, Extent(0, 0))
                found[name] = Extent(before.samples + n, max(before.places, places[name]))
        return found

    def form(self, cell: LayerState) -> RowForm:
        """The rows of a layer whose statistic is rows."""
        form = getattr(cell.curvature, "form", None)
        if form is None:
            name = type(cell.curvature).__name__
            raise ValueError(f"{name} does not say how large its rows are: give it a method form, as SampleSpace has")
        return form(cell.layer, self.seen[cell.name])

    def forward(self) -> list[OpCost]:
        return [
            work.times(count)
            for trace, count in self.passes
            for work in (*(w for call in trace.calls for w in call.passes.forward), *trace.forward)
        ]

    def backward(self, weights: bool = True) -> list[OpCost]:
        """The backward pass; without `weights` only towards the layers' outputs."""
        return [
            work.times(count)
            for trace, count in self.passes
            for work in (
                *(w for call in trace.calls if not call.first for w in call.passes.inputs),
                *(w for call in trace.calls if weights for w in call.passes.weights),
                *trace.backward,
            )
        ]

    def measure(self, cells: Sequence[LayerState]) -> dict[str, list[OpCost]]:
        """What measuring everything takes on each rank, by layer."""
        found: dict[str, list[OpCost]] = {}
        curved = {cell.name: cell for cell in cells if cell.curvature.statistics}
        for trace, count in self.passes:
            for call in trace.calls:
                cell = curved.get(call.name)
                for key in () if cell is None else cell.keys:
                    work = cell.curvature.measure_work(call.layer, key, call.x, call.y, self.ranks)  # type: ignore[union-attr]
                    found.setdefault(call.name, []).extend(w.times(count) for w in work)
        return found


@dataclass
class Owned:
    """What falls to one rank as an owner."""

    factor: list[OpCost] = field(default_factory=list)
    precondition: list[OpCost] = field(default_factory=list)
    update: list[OpCost] = field(default_factory=list)
    layers: int = 0
    measured: int = 0


def owned(rehearsal: Rehearsal, seen: Mapping[str, Extent]) -> list[Owned]:
    """The owners' work of a step in which everything was measured, rank by rank."""
    found = [Owned() for _ in range(rehearsal.world.size)]
    optimizer = rehearsal.second
    if optimizer is None:
        return found
    conjugate = isinstance(optimizer.method.rule, Conjugate)
    shards = 1 if rehearsal.sharding is None else rehearsal.sharding.shards
    rules = updates = 0.0
    for cell in optimizer.cells:
        what = seen.get(cell.name, Extent(0, 0))
        mine = found[cell.owner]
        mine.layers += 1
        for key in cell.keys:
            holder = found[cell.holders[key]]
            holder.factor += factor_work(cell, key, what)
            holder.measured += 1
        numel = cell.layer.shape.numel
        if not isinstance(cell.layer, UncurvedParameter):
            mine.precondition += cell.curvature.precondition_work(cell.layer, what)
        passes = CONJUGATE if conjugate else ADAM if isinstance(cell.layer, UncurvedParameter) else MOMENTUM
        if shards > 1:  # every rank has its part of all vectors
            rules += passes * numel / shards
            updates += 3 * numel / shards
            continue
        mine.precondition.append(moved(numel, passes))
        everyone = optimizer.method.gather == "directions"
        for rank in found if everyone else [mine]:
            rank.update.append(moved(numel, 3))
    if shards > 1:
        for rank in found:
            rank.precondition.append(moved(rules, 1))
            rank.update.append(moved(updates, 1))
    world = rehearsal.world
    return found if world.owners else [found[world.rank]] * world.size


def factor_work(cell: LayerState, key: str, what: Extent) -> list[OpCost]:
    """Taking in a statistic (unpacking, comparing, copying) and factoring it."""
    return [work for works in holder_work(cell, key, what) for work in works]
