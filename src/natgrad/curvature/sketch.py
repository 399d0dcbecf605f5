"""Sketches: maps from D numbers to few, linear and random, that keep inner products on the average.

E[(S u) . (S v)] = u . v for every sketch here. The same map must be applied to the columns and to the gradient
(specs: with g = U c the direction is then U times a bounded filter, whatever the map).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

CACHED = 2**16  # numbers that stay in a processor's cache


@dataclass(frozen=True)
class Sketch(ABC):
    """A map to fewer numbers. Layers that have no more are not sketched.

    Args:
        size: how many numbers columns are mapped to; None: 16 for each sample.

    """

    size: int | None = None

    def __post_init__(self):
        if self.size is not None and (not isinstance(self.size, int) or self.size < 1):
            raise ValueError(f"{type(self).__name__}(size={self.size!r}): give a whole number, 1 or more, or None")

    def wanted(self, samples: int) -> int:
        """To how many numbers the columns of so many samples are mapped."""
        return 16 * samples if self.size is None else self.size

    def held(self, length: int, size: int) -> int:
        """Bytes of a map that was drawn."""
        return 8 * size

    @abstractmethod
    def draw(self, length: int, size: int, generator: torch.Generator) -> Tensor:
        """One map, as numbers to be kept."""

    @abstractmethod
    def apply(self, drawn: Tensor, x: Tensor, size: int) -> Tensor:
        """X [..., length] mapped to [..., size]."""

    def apply_each(self, drawn: Tensor, x: Tensor, size: int) -> Tensor:
        """Vectors [m, length], each by a map of its own, `drawn` [m, ...], to [m, size]."""
        return torch.stack([self.apply(own, vector, size) for own, vector in zip(drawn, x)])


@dataclass(frozen=True)
class CountSketch(Sketch):
    """Every number is added, with a random sign, to one of `size` (Charikar, Chen and Farach-Colton 2002).

    Kept as [length] with the sign on place + 1.
    """

    def held(self, length: int, size: int) -> int:
        return 4 * length

    def draw(self, length: int, size: int, generator: torch.Generator) -> Tensor:
        options = {"generator": generator, "device": generator.device}
        places = torch.randint(size, (length,), **options) + 1
        return (places * (1 - 2 * torch.randint(2, (length,), **options))).int()

    def apply(self, drawn: Tensor, x: Tensor, size: int) -> Tensor:
        places, signs = drawn.abs(), drawn.sign()
        result = x.new_zeros(*x.shape[:-1], size + 1)  # the first of which nothing is added to
        columns, sums = x.reshape(-1, x.shape[-1]), result.view(-1, size + 1)
        step = max(1, len(columns))
        if x.device.type == "cpu":  # which adds to places in 64 bits alone without a call for each of them
            places, signs, step = places.long(), signs.to(x.dtype), max(1, CACHED // x.shape[-1])
        for some, out in zip(columns.split(step), sums.split(step)):
            out.index_add_(-1, places, some * signs)
        return result[..., 1:]

    def apply_each(self, drawn: Tensor, x: Tensor, size: int) -> Tensor:
        first = torch.arange(0, len(x) * (size + 1), size + 1, dtype=drawn.dtype, device=x.device)
        places = drawn.abs().add_(first[:, None])
        sums = x.new_zeros(len(x) * (size + 1)).index_add_(0, places.flatten(), (x * drawn.sign()).flatten())
        return sums.view(len(x), size + 1)[:, 1:]


@dataclass(frozen=True)
class Uniform(Sketch):
    """`size` of the numbers, drawn without replacement, times sqrt(length / size). What SENG's release draws."""

    def draw(self, length: int, size: int, generator: torch.Generator) -> Tensor:
        return torch.randperm(length, generator=generator, device=generator.device)[:size].sort().values

    def apply(self, drawn: Tensor, x: Tensor, size: int) -> Tensor:
        return x[..., drawn] * (self.length(x) / size) ** 0.5

    @staticmethod
    def length(x: Tensor) -> int:
        return x.shape[-1]
