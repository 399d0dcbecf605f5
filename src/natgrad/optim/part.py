"""The layers of one rank behind one another: what a rule of all parameters works on, one vector a device and type."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from natgrad.layers.base import real
from natgrad.optim.lengths import Step, rate_of
from natgrad.parallel import World


class Part:
    """Steps of layers on one device and of one type; `g` their gradients, and their kept vectors by key, all flat."""

    def __init__(self, places: Sequence[int], steps: Sequence[Step], gradients: Sequence[Tensor], keys: Iterable[str]):
        self.places, self.steps = places, steps
        self.shapes = [g.shape for g in gradients]
        self.g = flat(gradients)
        self.kept = {key: flat([step.state[key] for step in steps]) for key in keys}
        self.z = self.q = self.g  # q(g), and q'(g') where it is asked for

    def pieces(self, vector: Tensor) -> list[Tensor]:
        """A flat vector as one tensor a layer, [b, o, i] each; they share its memory."""
        sizes = [shape.numel() for shape in self.shapes]
        return [piece.view(shape) for piece, shape in zip(vector.split(sizes), self.shapes)]

    def keep(self, key: str, vector: Tensor) -> None:
        """Write a flat vector into the layers' states."""
        torch._foreach_copy_([step.state[key] for step in self.steps], self.pieces(vector))

    def scaled(self, vector: Tensor, rates: str) -> Tensor:
        """A flat vector, each entry times its own parameter's learning rate (`rates`: "lr" or "lr_last")."""
        numbers = [[rate_of(group, rates) for group in step.groups] for step in self.steps]
        one = numbers[0][0]
        if all(number == one for row in numbers for number in row):
            return vector * one
        packed = [
            step.layer.pack(
                [
                    torch.full_like(real(p.detach()), rate, dtype=vector.dtype)
                    for p, rate in zip(step.layer.parameters, row)
                ]
            )
            for step, row in zip(self.steps, numbers)
        ]
        return vector * flat(packed)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All entries, one tensor behind the other, copied."""
    return torch.cat([t.reshape(-1) for t in tensors])


def parts_of(steps: Sequence[Step], gradients: Sequence[Tensor], keys: Iterable[str]) -> list[Part]:
    """The steps by device and type."""
    keys, kinds = list(keys), {}
    for k, gradient in enumerate(gradients):
        kinds.setdefault((gradient.device, gradient.dtype), []).append(k)
    return [Part(ks, [steps[k] for k in ks], [gradients[k] for k in ks], keys) for ks in kinds.values()]


def total(world: World, count: int, rows: Iterable[Sequence[Tensor]], own: Sequence[float] = ()) -> list[float]:
    """Sums over all layers of all ranks of `count` scalars a part, and means over ranks of the numbers `own`.

    One message; all ranks get the same bits.
    """
    values = torch.zeros(count + len(own), dtype=torch.float64)
    if not len(values):
        return []
    for row in rows:
        values[:count] += torch.stack([value.double() for value in row]).cpu()
    if not world.owners:  # every rank has all layers
        values[:count] /= world.size
    values[count:] = torch.tensor(own, dtype=torch.float64) / world.size
    world.sum([values], "scalars")
    return values.tolist()
