"""All that one rank owns as flat vectors, one a device and type: what a rule of all parameters works on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from natgrad.optim.segments import Segment
from natgrad.parallel import World


class FlatShard:
    """Segments on one device and of one type; `g` their gradients, and their kept vectors by key, all flat.

    Where there is one segment its kept vectors are the state's own; of several they are copies until `keep`.
    """

    def __init__(
        self, places: Sequence[int], segments: Sequence[Segment], gradients: Sequence[Tensor], keys: Iterable[str]
    ):
        self.places, self.segments = places, segments
        self.sizes = [len(g) for g in gradients]
        self.g = joined(gradients)
        self.kept = {key: joined([segment.state[key] for segment in segments]) for key in keys}
        self.z = self.q = self.g  # q(g), and q'(g') where it is asked for

    def pieces(self, vector: Tensor) -> list[Tensor]:
        """A flat vector as one tensor a segment; they share its memory."""
        return list(vector.split(self.sizes))

    def keep(self, key: str, vector: Tensor) -> None:
        """Write a flat vector into the layers' states."""
        for segment, piece in zip(self.segments, self.pieces(vector)):
            if segment.state[key].data_ptr() != piece.data_ptr():
                segment.state[key].copy_(piece)

    def scaled(self, vector: Tensor, rates: str) -> Tensor:
        """A flat vector, each entry times its own parameter's learning rate (`rates`: "lr" or "lr_last")."""
        return joined([piece * s.rates(rates) for s, piece in zip(self.segments, self.pieces(vector))])


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """All entries, one tensor behind the other."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def parts_of(segments: Sequence[Segment], gradients: Sequence[Tensor], keys: Iterable[str]) -> list[FlatShard]:
    """The segments by device and type."""
    keys, kinds = list(keys), {}
    for k, gradient in enumerate(gradients):
        kinds.setdefault((gradient.device, gradient.dtype), []).append(k)
    return [FlatShard(ks, [segments[k] for k in ks], [gradients[k] for k in ks], keys) for ks in kinds.values()]


def total(world: World, count: int, rows: Iterable[Sequence[Tensor]], device: torch.device) -> list[Tensor]:
    """Sums over all layers of all ranks of `count` scalars a part, in double precision on a device, where they stay.

    One message; all ranks get the same bits.
    """
    values = torch.zeros(count, dtype=torch.float64, device=device)
    if not count:
        return []
    for row in rows:
        values += torch.stack(list(row)).to(values)
    if world.copies > 1:  # several ranks have the same numbers
        values /= world.copies
    world.sum([values], "scalars")
    return list(values.unbind())
