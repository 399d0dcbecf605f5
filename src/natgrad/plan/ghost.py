"""The real optimizer on ranks that are not there: its owners, every tensor of its state, every message of a step.

`Settings.build` makes the optimizer of a training run on a model without numbers, in a world whose other ranks are
silent; so placement, state and packing are those of training, by the very same code. What a step sends is written down
here in the order in which a step sends it (docs/design.md) and goes through the same `World`, which packs and counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from natgrad.cell import Cell
from natgrad.optim import SecondOrder
from natgrad.parallel import World
from natgrad.parallel.transport import Pending
from natgrad.train.optimizers import Settings


class Message(NamedTuple):
    """One collective: how, of what, and the bytes that each rank has in it (one number where all have alike)."""

    how: str
    kind: str
    chunks: tuple[int, ...]

    @property
    def payload(self) -> int:
        return sum(self.chunks)


@dataclass
class Ghost:
    """The last rank of `size`; the others say nothing. `log` keeps every message that was asked for."""

    size: int
    log: list[Message] = field(default_factory=list)
    kind: str = "other"

    def __post_init__(self) -> None:
        self.rank = self.size - 1

    def _note(self, how: str, chunks: Sequence[int]) -> None:
        if sum(chunks):
            self.log.append(Message(how, self.kind, tuple(chunks)))

    def all_reduce(self, buffer: Tensor, op: str = "sum") -> Tensor:
        self._note("all_reduce", [buffer.numel() * buffer.element_size()])
        return buffer

    def reduce_scatter(self, chunks: Sequence[Tensor]) -> Pending:
        self._note("reduce_scatter", [c.numel() * c.element_size() for c in chunks])
        return lambda: chunks[self.rank]

    def all_gather(self, chunk: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        self._note("all_gather", [n * chunk.element_size() for n in lengths])
        return [chunk if n == len(chunk) else chunk.new_empty(n) for n in lengths]

    def exchange(self, out: Mapping[int, Tensor], into: Mapping[int, Tensor]) -> None:
        """Nothing is written down: what each rank sends is told by `tell`."""

    def tell(self, how: str, kind: str, chunks: Sequence[int]) -> None:
        """Write down a message that does not pass through the transport."""
        self.kind = kind
        self._note(how, chunks)


class Built(NamedTuple):
    """An optimizer on a model without numbers, the world it believes in, and the ghost behind that."""

    optimizer: Optimizer
    world: World
    ghost: Ghost

    @property
    def cells(self) -> list[Cell]:
        """The layers; none for an optimizer that knows of no curvature."""
        return self.optimizer.cells if isinstance(self.optimizer, SecondOrder) else []

    @property
    def second(self) -> SecondOrder | None:
        return self.optimizer if isinstance(self.optimizer, SecondOrder) else None


def build(settings: Settings, model: nn.Module, ranks: int) -> Built:
    """The optimizer that `settings` make, as one of so many ranks."""
    ghost = Ghost(ranks)
    optimizer = settings.build(model, World(ghost))
    if isinstance(optimizer, SecondOrder):
        optimizer.engine.capture.disarm()
        world = optimizer.world
    else:
        world = World(ghost)
    world.sent.clear()
    ghost.log.clear()
    return Built(optimizer, world, ghost)


def bytes_of(states: Sequence[Mapping[str, Any]]) -> int:
    """Bytes of all tensors in these states."""
    tensors = [v for state in states for v in state.values() if isinstance(v, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def state_by_rank(built: Built, model: nn.Module, rows: Callable[[Cell], int]) -> list[int]:
    """Bytes of the optimizer's state on every rank after its first step. rows: of measured rows, at a cell's owner."""
    optimizer, size = built.second, built.world.size
    if optimizer is None:
        return [plain_state(built.optimizer, model)] * size
    totals, elsewhere = [0] * size, 0
    for cell in optimizer.cells:
        other = bytes_of(list(optimizer.fresh_state(cell, -1).values()))
        elsewhere += other
        here = {cell.owner, *cell.holders.values()} if built.world.owners else {built.world.rank}
        for rank in here:
            own = bytes_of(list(optimizer.fresh_state(cell, rank).values()))
            totals[rank] += own - other + (rows(cell) if rank == cell.owner else 0)
    if not built.world.owners:
        totals = [totals[built.world.rank]] * size
    return [elsewhere + total for total in totals]


def plain_state(optimizer: Optimizer, model: nn.Module) -> int:
    """Bytes of a plain optimizer's state: found by letting it step on its model without numbers."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    model.zero_grad()
    return bytes_of(list(optimizer.state.values()))
