"""What optimizers hold on every rank, by the tensors that they allocate; of those that are cut, each rank its part."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from natgrad.layer_state import LayerState
from natgrad.layers.shards import Cut
from natgrad.optim import SecondOrder
from natgrad.parallel import local_of
from natgrad_lab.plan.fsdp_passes import held
from natgrad_lab.plan.rehearsal import Rehearsal


def bytes_of(states: Sequence[Mapping[str, Any]]) -> int:
    """Bytes of this rank's part of all tensors in these states."""
    tensors = [local_of(v) for state in states for v in state.values() if isinstance(v, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def state_by_rank(rehearsal: Rehearsal, rows: Callable[[LayerState], int]) -> list[int]:
    """Bytes of the optimizer's state on every rank after its first step. rows: of measured rows, at a cell's owner."""
    optimizer, world = rehearsal.second, rehearsal.world
    if optimizer is None:
        return plain_state(rehearsal)
    if optimizer.shards is not None:
        return [sum(own) for own in zip(*(parts_by_rank(optimizer, cell, rows(cell)) for cell in optimizer.cells))]
    totals, elsewhere = [0] * world.size, 0
    for cell in optimizer.cells:
        other = bytes_of(list(optimizer.fresh_state(cell, -1).values()))
        elsewhere += other
        here = {cell.owner, *cell.holders.values()} if world.owners else {world.rank}
        for rank in here:
            own = bytes_of(list(optimizer.fresh_state(cell, rank).values()))
            totals[rank] += own - other + (rows(cell) if rank == cell.owner else 0)
    if not world.owners:
        totals = [totals[world.rank]] * world.size
    return [elsewhere + total for total in totals]


def parts_by_rank(optimizer: SecondOrder, cell: LayerState, rows: int) -> list[int]:
    """Bytes of a layer's state on every rank of a cut model: parts of vectors everywhere, curvature at its holders."""
    assert optimizer.shards is not None
    curvature = Counter[int]()
    for one in cell.held():
        curvature[one.rank] += math.prod(one.shape) * one.dtype.itemsize
    sharding = optimizer.shards.sharding
    bounds = sharding.bounds(Cut(cell.layer).form[1])
    parts: dict[int, int] = {}  # by the length of a part, of which there are three at most
    totals = []
    for rank in range(optimizer.world.size):
        start, stop = bounds[sharding.place_of[rank][1]]
        if stop - start not in parts:
            parts[stop - start] = bytes_of(list(optimizer.fresh_state(cell, rank).values())) - curvature[rank]
        totals.append(parts[stop - start] + curvature[rank])
    totals[cell.owner] += rows
    return totals


def plain_state(rehearsal: Rehearsal) -> list[int]:
    """Bytes of a plain optimizer's state by rank: found by letting it step on its model without numbers."""
    optimizer, model, world = rehearsal.optimizer, rehearsal.model, rehearsal.world
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    model.zero_grad()
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    if rehearsal.sharding is None:
        return [held(tensors, None, 0)] * world.size
    by_shard = [held(tensors, rehearsal.sharding, rank) for rank in rehearsal.sharding.ranks[0]]
    return [by_shard[rehearsal.sharding.place_of[rank][1]] for rank in range(world.size)]
