"""Fresh measurements become statistics, all of a step at once: running means, and by how much they have moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from natgrad.layer_state import LayerState, relative
from natgrad.readings import Readings, is_finite
from natgrad.refresh import NextInterval

TOGETHER = 2**20  # numbers that are looked at in one go: their differences need as much memory, best in a cache


class Fresh(NamedTuple):
    """A measurement of one statistic at its holder, and how many samples it is worth."""

    cell: LayerState
    key: str
    value: Tensor
    samples: int

    @property
    def last(self) -> Tensor:
        """The statistic as it is kept so far."""
        return self.cell.state()[self.key]


def absorb(found: Sequence[Fresh], readings: Readings) -> Callable[[], list[NextInterval]]:
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

    def intervals() -> list[NextInterval]:
        told = list[NextInterval]()
        for batch, counts, numbers in zip(batches, pasts, heard):
            values = iter(numbers.tolist())
            sound = [is_finite(next(values), one.last) for one in batch]
            changes = [
                [relative(_norm(one, values), _norm(one, values)) for _ in range(count)]
                for one, count in zip(batch, counts)
            ]
            told += [
                one.cell.next_interval(one.key, changed, one.samples) if good else NextInterval(0)
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
    """The new statistics as they are kept, and numbers for the host.

    These are the norm of each as it is kept, then |X - Y| and |Y| of all past Y, in parts (see `_norm`).
    """
    lasts, values = [one.last for one in batch], _packed(batch)
    fresh = list(values)
    shares = [one.cell.kept_share(one.key) for one in batch]
    for share in set(shares) - {0.0}:
        ks = [k for k, own in enumerate(shares) if own == share]
        means = torch._foreach_mul([lasts[k] for k in ks], share)
        torch._foreach_add_(means, [values[k] for k in ks], alpha=1 - share)
        for k, mean in zip(ks, means):
            fresh[k] = mean
    numbers = list(torch._foreach_norm(fresh))  # a mean with what is not finite any more is not finite
    pairs = [(one, new, old) for new, one in zip(fresh, batch) for old in one.cell.past(one.key)]
    if pairs:
        olds = _widened([old for *_, old in pairs], lasts[0].dtype)
        changes = torch._foreach_sub([new for _, new, _ in pairs], olds)
        ones = [one for one, *_ in pairs]
        for change, norm in zip(_norms(ones, changes), _norms(ones, olds)):
            numbers += [*change, *norm]
    return fresh, torch.stack(numbers)


def _packed(batch: Sequence[Fresh]) -> list[Tensor]:
    """The measurements in the form and type in which they are kept."""
    lasts, forms = [one.last for one in batch], [one.cell.forms.get(one.key) for one in batch]
    rooms = iter(_rooms([last for last, form in zip(lasts, forms) if form is not None], lasts[0].dtype))
    values, parts, places = list[Tensor](), list[Tensor](), list[Tensor]()
    for one, last, form in zip(batch, lasts, forms):
        values.append(one.value.to(last) if form is None else next(rooms))
        if form is not None:
            parts += form.parts(values[-1])
            places += form.places(one.value)
    if parts:
        torch._foreach_copy_(parts, places)
    return values


def _rooms(like: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Empty tensors of this type, shaped like the given ones, in one piece of memory."""
    if not like:
        return []
    sizes = [value.numel() for value in like]
    room = torch.empty(sum(sizes), dtype=dtype, device=like[0].device)
    return [part.view(value.shape) for part, value in zip(room.split(sizes), like)]


def _widened(values: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The values in this type; those that are kept in a narrower one are copied."""
    narrow = [value for value in values if value.dtype != dtype]
    wide = _rooms(narrow, dtype)
    if narrow:
        torch._foreach_copy_(wide, narrow)
    found = iter(wide)
    return [value if value.dtype == dtype else next(found) for value in values]


def _norms(ones: Sequence[Fresh], values: Sequence[Tensor]) -> list[list[Tensor]]:
    """The norms of all parts of each value: of all that it holds, or of what stands in its square twice and once."""
    forms = [one.cell.forms.get(one.key) for one in ones]
    parts = [[value] if form is None else form.by_weight(value) for form, value in zip(forms, values)]
    found = iter(torch._foreach_norm([part for own in parts for part in own]))
    return [[next(found) for _ in own] for own in parts]


def _norm(one: Fresh, told: Iterator[float]) -> float:
    """The Frobenius norm of a statistic with all entries, from the norms of its parts."""
    if one.cell.forms.get(one.key) is None:
        return next(told)
    return math.hypot(math.sqrt(2) * next(told), next(told))


def _write(batch: Sequence[Fresh], fresh: Sequence[Tensor]) -> None:
    """The statistics of before become those before the last, and fresh ones take their place."""
    pairs = [(before, one.last) for one in batch if (before := one.cell.state().get(f"{one.key}_before")) is not None]
    if pairs:
        torch._foreach_copy_([before for before, _ in pairs], [last for _, last in pairs])
    if batch:
        torch._foreach_copy_([one.last for one in batch], list(fresh))
