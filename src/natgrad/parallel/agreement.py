"""Do all ranks still have the same? Weights, clocks and shared numbers compared to the last bit, by digests.

In the usual case one message of 32 bytes says so: all ranks take the maximum of their digest d and of ~d, which are
complements of each other where all digests are equal. Only where they are not, two more messages find the first thing
that differs, and one more the ranks on which it does.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from natgrad.parallel.waiting import named
from natgrad.parallel.world import World

KIND = "check"  # of these messages, in World.sent
CHUNK = 1 << 22  # entries that are hashed at once, which takes 100 MB
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
NOTHING = torch.iinfo(torch.int64).min
MORE = (
    "start again from a checkpoint before that step; ranks drift where their machines, versions, settings or gradients "
    "are not the same (World(owners=True) sends every weight from its owner)"
)


class RanksDifferError(ValueError):
    """Something that all ranks should have alike differs.

    name: the first thing that does. ranks: those that differ from most others.
    """

    def __init__(self, text: str, name: str, ranks: Sequence[int]):
        super().__init__(text)
        self.name, self.ranks = name, tuple(ranks)


def compare(
    world: World,
    when: str,
    numbers: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    part: int = 0,
    parts: int = 1,
) -> None:
    """Compare over all ranks, which call this alike.

    when: what the message begins with. numbers: plain values, by what they are called. weights: tensors, the same on
    all ranks that have the same of `parts` parts of the model.

    Raises:
        RanksDifferError: on all ranks; names the first thing that differs, and the ranks.

    """
    if world.size == 1:
        return
    marks = [mark(value) for value in numbers.values()]
    digests = to_host([digest(weight) for weight in weights.values()])
    names = [*numbers, *(f"the weights of {name}" for name in weights)]
    totals = [NOTHING] * (1 + parts)
    totals[0], totals[1 + part] = mark([list(numbers), marks]), mark([list(weights), digests])
    if not differing(world, totals):
        return
    layout = everyones(world, mark(names))
    odd = minority(layout)
    if odd:
        raise RanksDifferError(
            f"{when} {named(odd)} and the others differ in what their optimizers are made of: this rank has "
            f"{len(numbers)} numbers and {len(weights)} weights; build the same model and optimizer on all ranks",
            "what the optimizer is made of",
            odd,
        )
    places = [NOTHING] * (len(digests) * parts)
    places[part * len(digests) : (part + 1) * len(digests)] = digests
    wrong = differing(world, [*marks, *places])
    first = wrong[0]
    inside, own = first - len(marks), [*marks, *digests]
    k = first if inside < 0 else len(marks) + inside % len(digests)
    has = inside < 0 or inside // len(digests) == part
    odd = minority(everyones(world, own[k] if has else NOTHING))
    raise RanksDifferError(
        f"{when} {named(odd)} {'differ' if len(odd) > 1 else 'differs'} from the other ranks in {names[k]}"
        f"{shown(world, list(numbers.values())[k] if inside < 0 else None, odd)}"
        f"{f', and {len(wrong) - 1} more' if len(wrong) > 1 else ''}: {MORE}",
        names[k],
        odd,
    )


def differing(world: World, digests: Sequence[int]) -> list[int]:
    """The places of digests that are not the same on all ranks that have one; NOTHING is none."""
    mine = torch.tensor(digests, dtype=torch.int64)
    both = torch.cat([mine, torch.where(mine == NOTHING, NOTHING, ~mine)])
    world.max([both], KIND)
    most, least = both.view(2, -1)
    return torch.nonzero((most != ~least) & (most != NOTHING)).flatten().tolist()


def everyones(world: World, number: int) -> list[int]:
    """A number of each rank."""
    found = torch.zeros(world.size, dtype=torch.int64)
    found[world.rank] = number
    world.sum([found], KIND)
    return found.tolist()


def minority(found: Sequence[int]) -> list[int]:
    """The ranks that have another number than most have; where two are as frequent, than the first ranks have."""
    there = [number for number in found if number != NOTHING]
    usual = max(Counter(there).items(), key=lambda entry: (entry[1], -there.index(entry[0])))[0]
    return [rank for rank, number in enumerate(found) if number not in (usual, NOTHING)]


def shown(world: World, value: Any, odd: Sequence[int]) -> str:
    """A number on the ranks that differ and elsewhere; nothing where it is none."""
    plain = not isinstance(value, bool) and isinstance(value, int | float)
    found = torch.zeros(world.size, dtype=torch.float64)
    found[world.rank] = float(value) if plain else 0.0
    world.sum([found], KIND)
    others = [rank for rank in range(world.size) if rank not in odd]
    return f" ({found[odd[0]].item()!r}, elsewhere {found[others[0]].item()!r})" if plain else ""


def mark(value: Any) -> int:
    """64 bits of a plain value."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little", signed=True)


def digest(tensor: Tensor) -> Tensor:
    """64 bits of a tensor's bits, on its device: the sum of its entries, read as integers, each times an odd number
    that its place decides, modulo 2^64. So any change of one entry is another digest.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    bits = flat.view(BITS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), CHUNK):
        part = bits[start : start + CHUNK].to(torch.int64)
        key = torch.arange(start, start + len(part), device=tensor.device).mul_(-0x61C8864680B583EB)
        key.bitwise_xor_(key >> 29).mul_(-0x40A7B892E31B1A47)
        total += key.bitwise_xor_(key >> 32).bitwise_or_(1).mul_(part).sum()
    return total


def to_host(numbers: Sequence[Tensor]) -> list[int]:
    """The values of 0-dimensional tensors, read once a device."""
    devices = dict.fromkeys(number.device for number in numbers)
    found = {d: iter(torch.stack([n for n in numbers if n.device == d]).tolist()) for d in devices}
    return [next(found[number.device]) for number in numbers]
