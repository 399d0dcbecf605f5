"""From mean gradients to new weights: directions and lengths at the owners, then the weights to everyone."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from natgrad.layer_state import LayerState
from natgrad.layers import UncurvedParameter
from natgrad.layers.layer import promote, real
from natgrad.optim.directions import Momentum, directions_kept
from natgrad.optim.fallback import Fallback, Recalls
from natgrad.optim.rescale import rescale
from natgrad.optim.segments import Segment
from natgrad.optim.step_size import Remembers, trust_ratios
from natgrad.parallel import OwnedTensor

if TYPE_CHECKING:
    from natgrad.optim.second_order import SecondOrder

LASTING = ("lr", "momentum", "weight_decay")
"""The numbers of a group of which the last step's are kept, under `NAME_last`."""


def begin(group: dict[str, Any]) -> None:
    """Make room in a group for the numbers of its last and its first step: all checkpoints have the same keys."""
    group |= {f"{name}_last": group[name] for name in LASTING} | {"lr_first": group["lr"]}


def update(
    optimizer: SecondOrder, present: Sequence[bool], vectors: Sequence[Tensor | None], bare: Collection[int] = ()
) -> None:
    """One step of every layer whose gradient this rank owns, and all new weights on every rank.

    vectors: this rank's gradients (see Gradients.to_owners). Cells in `bare` have not been measured, and take their
    gradient's direction at the length of their weight.
    """
    for group in optimizer.param_groups:  # a number of the groups, so that a resumed run knows it
        group["batch"] = optimizer.engine.samples or group.get("batch", 0)
    ready = optimizer.engine.clocks.ready
    chosen = [k for k, here in enumerate(present) if here and (ready[k] or k in bare)]
    work = partial(advance, optimizer, chosen, vectors, bool(bare))
    if optimizer.graphs is None or bare:
        optimizer.inputs.begin()
        work()
    else:
        optimizer.graphs.run(constants(optimizer, chosen), work, optimizer.inputs)
    if not bare:
        stand_still(optimizer, chosen)
    for group in optimizer.param_groups:
        group.update({f"{name}_last": group[name] for name in LASTING})
        if not optimizer.steps_made:
            group["lr_first"] = group["lr"]
    if optimizer.gather == "weights" and optimizer.world.size > 1:
        with optimizer.engine.timed("messages"):
            moving = [optimizer.cells[k] for k in chosen]
            parcels = [OwnedTensor(real(p.detach()), cell.owner) for cell in moving for p in cell.layer.parameters]
            optimizer.world.gather_narrow(parcels, "weights")


def advance(optimizer: SecondOrder, chosen: Sequence[int], vectors: Sequence[Tensor | None], bare: bool) -> None:
    """New directions, lengths and weights of the chosen layers that this rank owns.

    Nothing is read from a device, and numbers of the host that change from step to step are inputs (readings.py).
    """
    timed = optimizer.engine.timed
    with timed("precondition"):
        segments = segments_of(optimizer, chosen, vectors, bare)
        factors = aim(optimizer, segments, bare)
    if simple(optimizer):
        with timed("update"):
            for segment, factor in zip(segments, factors):
                move_segment(segment, factor)
        return
    parts: dict[nn.Parameter, Tensor] = {}
    moving = [optimizer.cells[k] for k in chosen]
    for segment, factor in zip(segments, factors):
        parts |= zip(segment.parameters, segment.views(moved(optimizer, segment, factor)))
    if optimizer.gather == "directions":
        with timed("messages"):
            share(optimizer, moving, parts)
    if optimizer.probe is not None:
        with timed("probe"):
            optimizer.probe({p: like(p, part) for p, part in parts.items()})
    with timed("update"):
        move_all(optimizer, moving, parts)


def constants(optimizer: SecondOrder, chosen: Sequence[int]) -> Hashable:
    """All by which `advance` decides on the host: a recorded step holds as long as it is the same."""
    groups = optimizer.param_groups
    names = ["momentum", "momentum_last", "weight_decay", "weight_decay_last", "damping"]
    if optimizer.reduction == "sum":
        names.append("batch")
    numbers = [tuple(group.get(name) for name in names) for group in groups]
    kept = [optimizer.rule.constant(group) for group in groups if isinstance(optimizer.rule, Momentum)]
    counts = {optimizer.cells[k].numbers["adam_count"] for k in chosen if "adam_count" in optimizer.cells[k].numbers}
    where = [p.data_ptr() for k in chosen for p in optimizer.cells[k].layer.parameters]
    return (*chosen, *numbers, *kept, len(counts), *where)


def stand_still(optimizer: SecondOrder, chosen: Collection[int]) -> None:
    """Layers that took no part in a step have no last step to look back on."""
    moved = set(chosen)
    for k, cell in enumerate(optimizer.cells if len(moved) < len(optimizer.cells) else ()):
        if k not in moved and "went" in cell.numbers:
            cell.numbers["went"] = [0.0, 0.0, 0.0]


def segments_of(
    optimizer: SecondOrder, places: Iterable[int], vectors: Sequence[Tensor | None], bare: bool
) -> list[Segment]:
    """The segments of the layers at these places that this rank owns, with their gradients."""
    storage, kept = optimizer.storage, directions_kept(optimizer.rule)
    segments = []
    rates: dict[torch.device, Sequence[Tensor]] = {}
    for outlines, layout, mine, vector in zip(optimizer.outlines.of(places), storage.layouts, storage.mine, vectors):
        device = layout.kind[1]
        if outlines and device not in rates:
            told = optimizer.inputs.get(lambda: [group["lr"] for group in optimizer.param_groups], device)
            rates[device] = told.unbind()
        for outline in outlines:
            assert vector is not None
            begin = outline.start - layout.start[mine[0]]
            gradient, fresh = vector[begin : begin + outline.numel], frozenset(optimizer.engine.whole)
            segment = Segment(outline, gradient, optimizer.inputs, rates[device], fresh)
            if optimizer.reduction == "sum":
                segment.terms = max(segment.group["batch"] / optimizer.world.size, 1.0)
            segment.curved = outline.curved and not bare
            segment.past = segment.state.get("last", segment.state.get(kept) if kept else None)
            segments.append(segment)
    return segments


def aim(optimizer: SecondOrder, segments: Sequence[Segment], bare: bool) -> list[Tensor | float]:
    """Fill in all directions; return the factors by which they are to be multiplied.

    bare: none of the segments has a curvature, and nobody learns from them.
    """
    length, curved = optimizer.length, [segment for segment in segments if segment.curved]
    learns = isinstance(length, Remembers)
    judged = list(segments) if learns and length.looks_back else curved
    if learns and not bare:
        for segment in judged if length.looks_back else ():
            if segment.past is None and not segment.curved:
                segment.past = recalled(optimizer.fallback, segment)
        length.look_back(judged)
    if not bare:
        optimizer.rule(curved, optimizer.natural, optimizer.world)
    for segment in segments:
        if not segment.curved:
            stretch(optimizer, segment, bare)
    if bare:
        return [1.0] * len(segments)
    if not learns:
        found = dict(zip(map(id, curved), length(curved, optimizer.world)))
        return [found.get(id(segment), 1.0) for segment in segments]
    numbers = learned(optimizer, length)
    found = dict(zip(map(id, judged), length.lengths(judged, optimizer.world, numbers)))
    optimizer.readings.ask(torch.stack([numbers[name] for name in length.numbers]), optimizer.hear_length)
    return [found.get(id(segment), 1.0) for segment in segments]


def learned(optimizer: SecondOrder, length: Remembers) -> dict[str, Tensor]:
    """What a length remembers, on the device."""

    def now() -> list[float]:
        return [optimizer.param_groups[0].get(name, value) for name, value in length.numbers.items()]

    return dict(zip(length.numbers, optimizer.inputs.get(now, optimizer.storage.device).unbind()))


def stretch(optimizer: SecondOrder, segment: Segment, bare: bool) -> None:
    """The fallback's direction, or the gradient's, as long as the weight."""
    direction = segment.gradient if bare else optimizer.fallback.direction(segment)
    segment.direction = segment.add_weights(direction)
    ratios = trust_ratios(segment)
    segment.direction = segment.direction * segment.spread(ratios)
    if "stretch" in segment.state and not bare:
        segment.state["stretch"] = ratios


def recalled(fallback: Fallback, segment: Segment) -> Tensor | None:
    """The last direction of parameters without curvature [n], made again from what the fallback keeps.

    It was d = r (a + c w): r the trust ratio of `stretch`, a the fallback's direction, c the weight decay. The step has
    made w - s d of the weights w, so d = r (a + c (w - s d)) / (1 - r c s). Where somebody else has changed the weights
    since, the decay is that of what they have become.
    """
    if not isinstance(fallback, Recalls):
        return None
    ratios, direction = segment.state["stretch"], fallback.again(segment)
    decay = segment.group.get("weight_decay_last", segment.group["weight_decay"])
    if decay:
        direction = segment.add_weights(direction, decay)
        ratios = ratios / (1 - decay * ratios * segment.state["went"][:, 0])
    return direction * segment.spread(ratios.to(direction))


def moved(optimizer: SecondOrder, segment: Segment, factor: Tensor | float) -> Tensor:
    """The direction times its factor: a vector of its own where it is to be changed or sent."""
    if isinstance(factor, Tensor):
        return segment.direction * (segment.spread(factor.to(segment.direction)) if factor.dim() else factor)
    if factor == 1 and optimizer.gather == "weights":
        return segment.direction
    return segment.direction * factor


def simple(optimizer: SecondOrder) -> bool:
    """Whether an update is nothing but w <- w - lr * direction at the owners."""
    if optimizer.gather != "weights" or optimizer.probe is not None or optimizer.rescale is not None:
        return False
    return not optimizer.storage.masters


def move_segment(segment: Segment, factor: Tensor | float) -> None:
    """W <- w - lr * factor * direction for all parameters of a segment, each with the lr of its own group."""
    outline = segment.outline
    rates = {place: segment.all_rates[place] * -1 for place in outline.by_group}
    if isinstance(factor, Tensor) and factor.dim():
        direction = segment.direction * segment.spread(factor.to(segment.direction))
    else:
        direction, rates = segment.direction, {place: rate * factor for place, rate in rates.items()}
    only = rates.popitem()[1] if len(rates) == 1 else None
    views = segment.views(direction if only is None else direction * only)
    for place, ks in outline.by_group.items():
        weights = [outline.parameters[k] for k in ks]
        weights = [real(w.detach()) if w.is_complex() else w for w in weights]
        moves = [views[k] for k in ks]
        if only is None:
            moves = list(torch._foreach_mul(moves, rates[place]))
        torch._foreach_add_(weights, moves)


def like(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """A part made of real numbers as one of the parameter's kind, sharing its memory."""
    return torch.view_as_complex(part) if parameter.is_complex() else part


def share(optimizer: SecondOrder, moving: Sequence[LayerState], parts: dict[nn.Parameter, Tensor]) -> None:
    """The directions of all owners on every rank (the stages of arXiv 1811.12019), instead of new weights."""
    parcels = []
    for cell in moving:
        for parameter in cell.layer.parameters:
            if cell.owner != optimizer.world.rank:
                parts[parameter] = real(torch.empty_like(parameter, dtype=promote(parameter).dtype))
            parts[parameter] = parts[parameter].contiguous()
            parcels.append(OwnedTensor(parts[parameter], cell.owner))
    optimizer.world.gather_narrow(parcels, "directions")


def move_all(optimizer: SecondOrder, moving: Sequence[LayerState], parts: Mapping[nn.Parameter, Tensor]) -> None:
    """W <- w - lr * part for every parameter, in one call a learning rate where nothing else is to be done."""
    plain: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for cell in moving:
        for parameter in cell.layer.parameters:
            if parameter not in parts:
                continue
            rescaled = optimizer.rescale is not None and parameter is cell.layer.parameters[0]
            if rescaled or "master" in optimizer.state[parameter]:
                move(optimizer, cell, parameter, like(parameter, parts[parameter]))
            else:
                weights, moves = plain.setdefault(optimizer.group_of(parameter)["lr"], ([], []))
                weight = real(parameter.detach())
                weights.append(weight)
                moves.append(parts[parameter].to(weight.dtype))
    for lr, (weights, moves) in plain.items():
        torch._foreach_add_(weights, moves, alpha=-lr)


def move(optimizer: SecondOrder, cell: LayerState, parameter: nn.Parameter, part: Tensor) -> None:
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
        if (
            hears is not None
            and lr > 0
            and cell.owner == optimizer.world.rank
            and not isinstance(cell.layer, UncurvedParameter)
        ):
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
