"""Rows of all ranks, stacked at the owners: every rank has a number of its own, so shapes differ from rank to rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from natgrad.parallel.packing import pack, packed_numel, unpack
from natgrad.parallel.world import OwnedTensor, World


def bring(world: World, parcels: Sequence[OwnedTensor], counts: Tensor, kind: str = "other") -> list[Tensor | None]:
    """Rows of all ranks, rank behind rank, at each parcel's owner, None elsewhere.

    counts [parcels, ranks]: how many rows each rank has, the first dimension of its parcels; the others are alike.
    """
    if world.size == 1:
        return [p.tensor for p in parcels]
    numbers = [[int(n) for n in row] for row in counts.tolist()]
    if not world.owners:
        world.count(kind, parcels)
        return [_everywhere(world, parcel, row, kind) for parcel, row in zip(parcels, numbers)]
    world.count(kind, [p for p in parcels if p.owner != world.rank])
    results: list[Tensor | None] = [None] * len(parcels)
    for dtype in dict.fromkeys(p.tensor.dtype for p in parcels):
        same = [k for k, p in enumerate(parcels) if p.tensor.dtype == dtype]
        mine = [k for k in same if parcels[k].owner == world.rank]
        world.report("exchange", kind, _received(world, parcels, same, numbers))
        for k, value in zip(mine, _exchange(world, parcels, same, mine, numbers)):
            results[k] = value
    return results


def _received(world: World, parcels: Sequence[OwnedTensor], same: list[int], numbers: list[list[int]]) -> list[int]:
    """The bytes that every rank receives from the others, of the parcels `same`."""
    received = [0] * world.size
    for parcel, row in ((parcels[k], numbers[k]) for k in same):
        one = packed_numel(parcel.tensor.shape[1:], False) * parcel.tensor.element_size()
        received[parcel.owner] += one * (sum(row) - row[parcel.owner])
    return received


def _exchange(
    world: World, parcels: Sequence[OwnedTensor], same: list[int], mine: list[int], numbers: list[list[int]]
) -> list[Tensor]:
    """Send to every owner what is its own, of the parcels `same`; the stacks of those that are mine."""
    others = [r for r in range(world.size) if r != world.rank]
    to = {r: [parcels[k].tensor for k in same if parcels[k].owner == r] for r in others}
    out = {r: pack(tensors, [False] * len(tensors)) for r, tensors in to.items() if tensors}
    shapes = {r: [(numbers[k][r], *parcels[k].tensor.shape[1:]) for k in mine] for r in others}
    lengths = {r: sum(packed_numel(shape, False) for shape in shapes[r]) for r in others}
    into = {r: parcels[mine[0]].tensor.new_empty(lengths[r]) for r in others} if mine else {}
    world.transport.exchange(out, into)
    parts = {r: unpack(buffer, shapes[r], [False] * len(mine)) for r, buffer in into.items()}
    parts[world.rank] = [parcels[k].tensor for k in mine]
    return [torch.cat([parts[r][place] for r in range(world.size)]) for place in range(len(mine))]


def _everywhere(world: World, parcel: OwnedTensor, numbers: list[int], kind: str) -> Tensor:
    """The stack of one parcel's rows on every rank."""
    shape = parcel.tensor.shape[1:]
    lengths = [n * packed_numel(shape, False) for n in numbers]
    world.report("all_gather", kind, [n * parcel.tensor.element_size() for n in lengths])
    chunks = world.transport.all_gather(parcel.tensor.reshape(-1), lengths)
    return torch.cat([c.view(n, *shape) for c, n in zip(chunks, numbers)])
