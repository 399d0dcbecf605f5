"""Fresh measurements become statistics, all of a step at once: running means, and by how much they have moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from natgrad.cell import Cell, relative
from natgrad.readings import Readings
from natgrad.staleness import Told

TOGETHER = 2**20  # numbers that are looked at in one go: their differences need as much memory, best in a cache


class Fresh(NamedTuple):
    """A measurement of one statistic at its holder, and how many samples it is worth."""

    cell: Cell
    key: str
    value: Tensor
    samples: int

    @property
    def last(self) -> Tensor:
        """The statistic as it is kept so far."""
        return self.cell.state()[self.key]


def absorb(found: Sequence[Fresh], readings: Readings) -> Callable[[], list[Told]]:
    """Take in measurements. What is returned gives, after a read, for each when the next one is due.

    An interval of 0 stands for a statistic that has become infinite. The staleness rule is told |X - Y| / |Y| for each
    past value Y that it asks for (Frobenius norms, SP-NGD section 4.3.1).
    """
    batches = list(_batches(found))
    heard = list[Tensor]()
    pasts = [[len(one.cell.past(one.key)) for one in batch] for batch in batches]
    for batch in batches:
        fresh, numbers = _look(batch)
        readings.ask(numbers, heard.append)
        _write(batch, fresh)

    def intervals() -> list[Told]:
        told = list[Told]()
        for batch, counts, numbers in zip(batches, pasts, heard):
            values = iter(numbers.tolist())
            sound = [math.isfinite(next(values)) for _ in batch]
            changes = [[relative(next(values), next(values)) for _ in range(count)] for count in counts]
            told += [
                one.cell.next_interval(one.key, changed, one.samples) if good else Told(0)
                for one, changed, good in zip(batch, changes, sound)
            ]
        return told

    return intervals


def _batches(found: Sequence[Fresh]) -> Iterator[list[Fresh]]:
    """In their order, in batches of one type and device that are not too large."""
    batch, count = list[Fresh](), 0
    for one in found:
        value = one.last
        if batch and (count + value.numel() > TOGETHER or not alike(batch[0].last, value)):
            yield batch
            batch, count = [], 0
        batch.append(one)
        count += value.numel()
    if batch:
        yield batch


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one type and are on one device."""
    return one.dtype == other.dtype and one.device == other.device


def _look(batch: list[Fresh]) -> tuple[list[Tensor], Tensor]:
    """The new statistics, and numbers for the host: the largest entry of each, then |X - Y| and |Y| of all past Y."""
    lasts = [one.last for one in batch]
    values = [one.value.to(last) for one, last in zip(batch, lasts)]
    fresh = list(values)
    shares = [one.cell.kept_share(one.key) for one in batch]
    for share in set(shares) - {0.0}:
        ks = [k for k, own in enumerate(shares) if own == share]
        means = torch._foreach_mul([lasts[k] for k in ks], share)
        torch._foreach_add_(means, [values[k] for k in ks], alpha=1 - share)
        for k, mean in zip(ks, means):
            fresh[k] = mean
    numbers = list(torch._foreach_norm(values, math.inf))
    pairs = [(new, old) for new, one in zip(fresh, batch) for old in one.cell.past(one.key)]
    if pairs:
        olds = [old for _, old in pairs]
        changes = torch._foreach_norm(torch._foreach_sub([new for new, _ in pairs], olds))
        numbers += [n for pair in zip(changes, torch._foreach_norm(olds)) for n in pair]
    return fresh, torch.stack(numbers)


def _write(batch: Sequence[Fresh], fresh: Sequence[Tensor]) -> None:
    """The statistics of before become those before the last, and fresh ones take their place."""
    pairs = [(before, one.last) for one in batch if (before := one.cell.state().get(f"{one.key}_before")) is not None]
    if pairs:
        torch._foreach_copy_([before for before, _ in pairs], [last for _, last in pairs])
    if batch:
        torch._foreach_copy_([one.last for one in batch], list(fresh))
