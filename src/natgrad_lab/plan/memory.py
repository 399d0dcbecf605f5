"""What optimizers hold on every rank, by the tensors that they allocate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from natgrad.layer_state import LayerState
from natgrad_lab.plan.rehearsal import Rehearsal


def bytes_of(states: Sequence[Mapping[str, Any]]) -> int:
    """Bytes of all tensors in these states."""
    tensors = [v for state in states for v in state.values() if isinstance(v, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def state_by_rank(rehearsal: Rehearsal, rows: Callable[[LayerState], int]) -> list[int]:
    """Bytes of the optimizer's state on every rank after its first step. rows: of measured rows, at a cell's owner."""
    optimizer, world = rehearsal.second, rehearsal.world
    if optimizer is None:
        return [plain_state(rehearsal.optimizer, rehearsal.model)] * world.size
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


def plain_state(optimizer: Optimizer, model: nn.Module) -> int:
    """Bytes of a plain optimizer's state: found by letting it step on its model without numbers."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    model.zero_grad()
    return bytes_of(list(optimizer.state.values()))
