"""Update: from mean gradients to new weights. Owners find the step and make it; then the weights go to everyone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.layer_state import LayerState
from natgrad.layers import UncurvedParameter
from natgrad.layers.layer import promote, real
from natgrad.optim.aim import Aim
from natgrad.optim.directions import decouples, leaves_weights
from natgrad.optim.graphs import Graphs
from natgrad.optim.rescale import rescale
from natgrad.optim.segments import Segment
from natgrad.parallel import OwnedTensor

LASTING = ("lr", "momentum", "weight_decay")
"""The numbers of a group of which the last step's are kept, under `NAME_last`."""


def begin(group: dict[str, Any]) -> None:
    """Make room in a group for the numbers of its last and its first step: all checkpoints have the same keys."""
    group |= {f"{name}_last": group[name] for name in LASTING} | {"lr_first": group["lr"]}


class Update:
    """Steps of an optimizer whose layers and storage stay as they are.

    state: the optimizer's, by the parameters that the storage knows. narrow: the type in which owners send new weights,
    where it is not the weights' own.
    """

    def __init__(
        self,
        aim: Aim,
        state: Callable[[], Mapping[Any, dict[str, Any]]],
        graphs: Graphs | None,
        narrow: torch.dtype | None,
    ):
        self.aim, self.state, self.graphs, self.narrow = aim, state, graphs, narrow
        self.method, self.engine, self.storage, self.world = aim.method, aim.engine, aim.storage, aim.engine.world

    @property
    def groups(self) -> Sequence[dict[str, Any]]:
        """The optimizer's param_groups."""
        return self.aim.outlines.groups()

    def __call__(
        self, present: Sequence[bool], vectors: Sequence[Tensor | None], bare: Collection[int] = frozenset()
    ) -> None:
        """One step of every layer whose gradient this rank owns, and all new weights on every rank.

        vectors: this rank's gradients (see Gradients.to_owners). Layers in `bare` have not been measured, and take
        their gradient's direction at the length of their weight.
        """
        for group in self.groups:  # a number of the groups, so that a resumed run knows it
            group["batch"] = self.engine.samples or group.get("batch", 0)
        ready = self.engine.clocks.ready
        chosen = [k for k, here in enumerate(present) if here and (ready[k] or k in bare)]
        work = partial(self._advance, chosen, vectors, bool(bare))
        if self.graphs is None or bare:
            self.aim.inputs.begin()
            work()
        else:
            self.graphs.run(self._constants(chosen), work, self.aim.inputs)
        if not bare:
            self._stand_still(chosen)
        first = not self.storage.table("step").rows[0]
        for group in self.groups:
            group.update({f"{name}_last": group[name] for name in LASTING})
            if first:
                group["lr_first"] = group["lr"]
        if self.method.gather == "weights" and self.world.size > 1 and self.aim.owners is None:
            with self.engine.timed("messages"):
                moving = [self.storage.cells[k] for k in chosen]
                parcels = [OwnedTensor(real(p.detach()), cell.owner) for cell in moving for p in cell.layer.parameters]
                self.world.gather_narrow(parcels, "weights")

    def _advance(self, chosen: Sequence[int], vectors: Sequence[Tensor | None], bare: bool) -> None:
        """New directions, lengths and weights of the chosen layers that this rank owns.

        Nothing is read from a device, and numbers of the host that change from step to step are inputs (readings.py).
        """
        timed = self.engine.timed
        with timed("precondition"):
            segments = self.aim.segments(chosen, vectors, bare)
            factors = self.aim(segments, bare)
        if self._simple():
            with timed("update"):
                for segment, factor in zip(segments, factors):
                    move_segment(segment, factor, decouples(self.method.rule))
            return
        parts: dict[nn.Parameter, Tensor] = {}
        moving = [self.storage.cells[k] for k in chosen]
        for segment, factor in zip(segments, factors):
            parts |= zip(segment.parameters, segment.views(self._scaled(segment, factor)))
        if self.method.gather == "directions":
            with timed("messages"):
                self._share(moving, parts)
        if self.method.probe is not None:
            with timed("probe"):
                self.method.probe({p: like(p, part) for p, part in parts.items()})
        with timed("update"):
            if leaves_weights(self.method.rule):
                write_gradients({p: like(p, part) for p, part in parts.items()})
            else:
                self._move_all(moving, parts)

    def _constants(self, chosen: Sequence[int]) -> Hashable:
        """All by which `_advance` decides on the host: a recorded step holds as long as it is the same."""
        cells = [self.storage.cells[k] for k in chosen]
        counts = {cell.numbers["adam_count"] for cell in cells if "adam_count" in cell.numbers}
        where = [p.data_ptr() for cell in cells for p in cell.layer.parameters]
        told = self.aim.loss() is not None
        return (*chosen, *self.method.constants(self.groups), len(counts), told, *where)

    def _stand_still(self, chosen: Collection[int]) -> None:
        """Layers that took no part in a step have no last step to look back on."""
        moved, cells = set(chosen), self.storage.cells
        for k, cell in enumerate(cells if len(moved) < len(cells) else ()):
            if k not in moved and "went" in cell.numbers:
                cell.numbers["went"] = [0.0, 0.0, 0.0]

    def _simple(self) -> bool:
        """Whether an update is nothing but w <- w - lr * direction at the owners."""
        method = self.method
        if method.gather != "weights" or method.probe is not None or method.rescale is not None:
            return False
        return not self.storage.masters

    def _scaled(self, segment: Segment, factor: Tensor | float) -> Tensor:
        """The direction times its factor: a vector of its own where it is to be changed or sent."""
        if isinstance(factor, Tensor):
            return segment.direction * (segment.spread(factor.to(segment.direction)) if factor.dim() else factor)
        if factor == 1 and self.method.gather == "weights":
            return segment.direction
        return segment.direction * factor

    def _share(self, moving: Sequence[LayerState], parts: dict[nn.Parameter, Tensor]) -> None:
        """The directions of all owners on every rank (the stages of arXiv 1811.12019), instead of new weights."""
        parcels = []
        for cell in moving:
            for parameter in cell.layer.parameters:
                if cell.owner != self.world.rank:
                    parts[parameter] = real(torch.empty_like(parameter, dtype=promote(parameter).dtype))
                parts[parameter] = parts[parameter].contiguous()
                parcels.append(OwnedTensor(parts[parameter], cell.owner))
        self.world.gather_narrow(parcels, "directions")

    def _group_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        return self.groups[self.aim.outlines.group_of(parameter)]

    def _rates(self, parameter: nn.Parameter) -> tuple[float, float]:
        """The learning rate of a parameter, and the share of its value that decay beside the direction leaves."""
        group = self._group_of(parameter)
        return group["lr"], 1 - group["lr"] * group["weight_decay"] * decouples(self.method.rule)

    def _move_all(self, moving: Sequence[LayerState], parts: Mapping[nn.Parameter, Tensor]) -> None:
        """W <- w - lr * part for every parameter, in one call a learning rate where nothing else is to be done."""
        plain: dict[tuple[float, float], tuple[list[Tensor], list[Tensor]]] = {}
        for cell in moving:
            for parameter in cell.layer.parameters:
                if parameter not in parts:
                    continue
                rescaled = self.method.rescale is not None and parameter is cell.layer.parameters[0]
                if rescaled or "master" in self.state()[parameter]:
                    self._move(cell, parameter, like(parameter, parts[parameter]))
                else:
                    weights, moves = plain.setdefault(self._rates(parameter), ([], []))
                    weight = real(parameter.detach())
                    weights.append(weight)
                    moves.append(parts[parameter].to(weight.dtype))
        for (lr, kept), (weights, moves) in plain.items():
            if kept != 1:
                torch._foreach_mul_(weights, kept)
            torch._foreach_add_(weights, moves, alpha=-lr)

    def _move(self, cell: LayerState, parameter: nn.Parameter, part: Tensor) -> None:
        """W <- w - lr * part with the lr of the parameter's own group, and rescaled if asked for."""
        state, (lr, kept) = self.state()[parameter], self._rates(parameter)
        weight = latest(parameter, state, self.narrow)
        if kept != 1:
            weight.mul_(kept)
        if self.method.rescale is None or parameter is not cell.layer.parameters[0]:
            weight.add_(part.to(weight.dtype), alpha=-lr)
        else:
            before = weight.clone()
            weight.add_(part.to(weight.dtype), alpha=-lr)
            rescale(weight, cell.layer, self.method.rescale)
            hears = getattr(self.method.rule, "moved", None)
            curved = not isinstance(cell.layer, UncurvedParameter)
            if hears is not None and lr > 0 and cell.owner == self.world.rank and curved:
                hears(cell.layer, state, (before - weight).to(part.dtype) / lr)
        if weight is not parameter:
            parameter.copy_(weight)


def move_segment(segment: Segment, factor: Tensor | float, decay: bool) -> None:
    """W <- w - lr * (factor * direction + decay * w) for a segment's parameters, each with the numbers of its group."""
    outline, direction = segment.outline, segment.direction
    lost = {place: outline.groups()[place]["weight_decay"] if decay else 0.0 for place in outline.by_group}
    kept = {place: 1 - segment.all_rates[place] * share for place, share in lost.items() if share}
    if isinstance(factor, Tensor) and factor.dim():
        direction, factor = direction * segment.spread(factor.to(direction)), 1.0
    rates = {place: segment.all_rates[place] * -factor for place in outline.by_group}
    moves = outline.moves()
    if len(rates) == 1:
        torch.mul(direction, rates.popitem()[1], out=moves)
    else:
        moves.copy_(direction)
    for place, parameters in outline.by_group.items():
        weights = list[Tensor](parameters)
        if outline.complex:
            weights = [real(w.detach()) for w in parameters]
        views = outline.room.views(parameters)
        if place in rates:
            torch._foreach_mul_(views, rates[place])
        if place in kept:
            torch._foreach_mul_(weights, kept[place])
        torch._foreach_add_(weights, views)


def write_gradients(parts: Mapping[nn.Parameter, Tensor]) -> None:
    """Put a direction for each parameter into its `.grad`."""
    for parameter, part in parts.items():
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        parameter.grad.copy_(part)


def like(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """A part made of real numbers as one of the parameter's kind, sharing its memory."""
    return torch.view_as_complex(part) if parameter.is_complex() else part


def master(parameter: nn.Parameter, narrow: torch.dtype | None) -> dict[str, Tensor]:
    """What is kept of a parameter that is rounded to half precision: its value before, where small steps add up."""
    single = torch.promote_types(parameter.dtype, torch.float32)
    if single == parameter.dtype and narrow is None:
        return {}
    return {"master": parameter.detach().to(single, copy=True)}


def latest(parameter: nn.Parameter, state: dict[str, Any], narrow: torch.dtype | None) -> Tensor:
    """The tensor to update: the parameter itself, or its master wherever nobody has changed the parameter since."""
    kept = state.get("master")
    if kept is None:
        return parameter
    ours = kept.to(narrow or parameter.dtype).to(parameter.dtype) == parameter
    return kept.copy_(torch.where(ours, kept, parameter.to(kept.dtype)))
