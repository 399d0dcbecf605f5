"""From mean gradients to new weights: directions and lengths at the owners, then the weights to everyone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from natgrad.cell import Cell
from natgrad.layers import Loose
from natgrad.layers.base import promote, real
from natgrad.optim.lengths import Remembers, Step, trust_ratio
from natgrad.optim.rescale import rescale
from natgrad.optim.rules import directions_kept, takes_loose, with_decay
from natgrad.parallel import Parcel

if TYPE_CHECKING:
    from natgrad.optim.base import SecondOrder


def update(
    optimizer: SecondOrder, present: Sequence[bool], gradients: Mapping[int, Tensor], bare: Collection[int] = ()
) -> None:
    """One step of every layer whose gradient this rank owns, and all new weights on every rank.

    Cells in `bare` have not been measured, and take their gradient's direction at the length of their weight.
    """
    cells, timed = optimizer.cells, optimizer.engine.timed
    for group in optimizer.param_groups:  # a number of the groups, so that a resumed run knows it
        group["batch"] = optimizer.engine.samples or group.get("batch", 0)
    with timed("precondition"):
        steps = [prepare(optimizer, k, g, k in bare) for k, g in gradients.items() if cells[k].ready or k in bare]
        factors = aim(optimizer, steps, bool(bare))
        parts: dict[nn.Parameter, Tensor] = {}
        for step in steps:
            factor = factors.get(id(step), 1.0)
            whole = isinstance(factor, float) and factor == 1 and optimizer.gather == "weights"
            unpacked = step.layer.unpack(step.direction if whole else step.direction * factor)
            parts |= zip(step.layer.parameters, unpacked)
    moving = [cell for k, cell in enumerate(cells) if present[k] and (cell.ready or k in bare)]
    if optimizer.gather == "directions":
        with timed("messages"):
            share(optimizer, moving, parts)
    if optimizer.probe is not None:
        with timed("probe"):
            optimizer.probe(parts)
    with timed("update"):
        move_all(optimizer, moving, parts)
        for group in optimizer.param_groups:
            group["lr_last"] = group["lr"]
            if not optimizer.steps_made:
                group["lr_first"] = group["lr"]
    if optimizer.gather == "weights":
        with timed("messages"):
            parcels = [Parcel(real(p.detach()), cell.owner) for cell in moving for p in cell.layer.parameters]
            optimizer.world.gather_narrow(parcels, "weights")


def aim(optimizer: SecondOrder, steps: Sequence[Step], bare: bool) -> dict[int, Tensor | float]:
    """Fill in all directions; return the factors of those that have another length, by id of the step.

    bare: none of the steps has a curvature, and nobody learns from them.
    """
    length, curved = optimizer.length, [step for step in steps if step.curved]
    learns = isinstance(length, Remembers)
    judged = list(steps) if learns and length.looks_back else curved
    if learns and not bare:
        length.look_back(judged)
    if not bare:
        optimizer.rule(curved, optimizer.natural, optimizer.world)
    for step in steps:
        if not step.curved:
            step.direction = with_decay(step, step.direction)
            step.direction = step.direction * trust_ratio(step)
    if bare:
        return {}
    if not learns:
        return {id(s): f for s, f in zip(curved, length(curved, optimizer.world))}
    numbers = {name: optimizer.param_groups[0].get(name, value) for name, value in length.numbers.items()}
    found = length.lengths(judged, optimizer.world, numbers)
    for group in optimizer.param_groups:
        group.update(numbers)
    still = {id(cell) for cell in optimizer.cells} - {id(step.cell) for step in judged}
    for cell in optimizer.cells:  # a layer that stood still has no last step to look back on
        if id(cell) in still and "went" in cell.state():
            cell.state()["went"].zero_()
    return {id(s): f for s, f in zip(judged, found)}


def share(optimizer: SecondOrder, moving: Sequence[Cell], parts: dict[nn.Parameter, Tensor]) -> None:
    """The directions of all owners on every rank (the stages of arXiv 1811.12019), instead of new weights."""
    parcels = []
    for cell in moving:
        for parameter in cell.layer.parameters:
            if cell.owner != optimizer.world.rank:
                parts[parameter] = torch.empty_like(parameter, dtype=promote(parameter).dtype)
            parts[parameter] = parts[parameter].contiguous()
            parcels.append(Parcel(real(parts[parameter]), cell.owner))
    optimizer.world.gather_narrow(parcels, "directions")


def prepare(optimizer: SecondOrder, index: int, gradient: Tensor, bare: bool = False) -> Step:
    """The step of one layer. Its direction is the rule's to say, save for loose parameters, which have their own."""
    cell, fresh = optimizer.cells[index], index in optimizer.engine.whole
    groups = [optimizer.group_of(p) for p in cell.layer.parameters]
    damping = groups[0]["damping"]

    def precondition(given: Tensor) -> Tensor:
        return cell.precondition(given, damping, fresh and given is gradient)

    state = cell.state()
    step = Step(cell.layer, gradient, precondition, state, groups, gradient, cell=cell, fresh=fresh)
    if optimizer.reduction == "sum":
        step.terms = max(groups[0]["batch"] / optimizer.world.size, 1.0)
    step.past = state.get("last", state.get(directions_kept(optimizer.rule)))
    if bare:
        step.curved = False
    elif isinstance(cell.layer, Loose) and not takes_loose(optimizer.rule):
        step.curved = False
        step.direction = optimizer.fallback.direction(state, gradient, groups[0]["momentum"])
    return step


def move_all(optimizer: SecondOrder, moving: Sequence[Cell], parts: Mapping[nn.Parameter, Tensor]) -> None:
    """W <- w - lr * part for every parameter, in one call a learning rate where nothing else is to be done."""
    plain: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for cell in moving:
        for parameter in cell.layer.parameters:
            if parameter not in parts:
                continue
            rescaled = optimizer.rescale is not None and parameter is cell.layer.parameters[0]
            if rescaled or "master" in optimizer.state[parameter]:
                move(optimizer, cell, parameter, parts[parameter])
            else:
                weights, moves = plain.setdefault(optimizer.group_of(parameter)["lr"], ([], []))
                weights.append(parameter)
                moves.append(parts[parameter].to(parameter.dtype))
    for lr, (weights, moves) in plain.items():
        torch._foreach_add_(weights, moves, alpha=-lr)


def move(optimizer: SecondOrder, cell: Cell, parameter: nn.Parameter, part: Tensor) -> None:
    """W <- w - lr * part with the lr of the parameter's own group, and rescaled if asked for."""
    state, lr = optimizer.state[parameter], optimizer.group_of(parameter)["lr"]
    weight = latest(parameter, state, optimizer.narrow)
    if optimizer.rescale is None or parameter is not cell.layer.parameters[0]:
        weight.add_(part.to(weight.dtype), alpha=-lr)
    else:
        before = weight.clone()
        weight.add_(part.to(weight.dtype), alpha=-lr)
        rescale(weight, cell.layer, optimizer.rescale)
        hears = getattr(optimizer.rule, "moved", None)
        if hears is not None and lr > 0 and cell.owner == optimizer.world.rank and not isinstance(cell.layer, Loose):
            hears(cell.layer, state, (before - weight).to(part.dtype) / lr)
    if weight is not parameter:
        parameter.copy_(weight)


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
