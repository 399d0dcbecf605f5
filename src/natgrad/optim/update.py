"""From mean gradients to new weights: directions and lengths at the owners, then the weights to everyone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from natgrad.cell import Cell
from natgrad.layers import Loose
from natgrad.optim.lengths import Step, trust_ratio
from natgrad.optim.rescale import rescale_weights
from natgrad.optim.rules import with_decay
from natgrad.parallel import Parcel

if TYPE_CHECKING:
    from natgrad.optim.base import SecondOrder


def update(optimizer: SecondOrder, present: Sequence[bool], gradients: Mapping[int, Tensor]) -> None:
    """One step of every layer whose gradient this rank owns, and all new weights on every rank."""
    cells, timed = optimizer.cells, optimizer.engine.timed
    with timed("precondition"):
        steps = [prepare(optimizer, cells[k], g) for k, g in gradients.items() if cells[k].ready]
        curved = [step for step in steps if step.curved]
        optimizer.rule(curved, optimizer.world)
        factors = {id(s): f for s, f in zip(curved, optimizer.length(curved, optimizer.world))}
    with timed("update"):
        for step in steps:
            move(step, factors[id(step)] if step.curved else trust_ratio(step))
            if optimizer.rescale is not None:
                rescale_weights(step.layer, optimizer.rescale)
        for group in optimizer.param_groups:
            group["lr_last"] = group["lr"]
            group.setdefault("lr_first", group["lr"])
    with timed("messages"):
        moved = [cell for cell, here in zip(cells, present) if here]
        parcels = [Parcel(p.detach(), cell.owner) for cell in moved for p in cell.layer.parameters]
        optimizer.world.gather(parcels, "weights")


def prepare(optimizer: SecondOrder, cell: Cell, gradient: Tensor) -> Step:
    """The step of one layer. Its direction is the rule's to say, save for loose parameters, which have their own."""
    groups = [optimizer.group_of(p) for p in cell.layer.parameters]
    step = Step(cell.layer, gradient, cell.precondition, cell.state(), groups, gradient)
    if isinstance(cell.layer, Loose):
        step.curved = False
        step.direction = with_decay(step, optimizer.fallback.direction(step.state, gradient, groups[0]["momentum"]))
    return step


def move(step: Step, factor: Tensor | float) -> None:
    """W <- w - lr * factor * direction, each parameter with the lr of its own group."""
    parts = step.layer.unpack(step.direction * factor)
    for parameter, part, group in zip(step.layer.parameters, parts, step.groups):
        parameter.add_(part.to(parameter.dtype), alpha=-group["lr"])
