"""Sketches: maps from D numbers to few, linear and random, that keep inner products on the average.

E[(S u) . (S v)] = u . v for every sketch here. The same map must be applied to the columns and to the gradient
(specs: with g = U c the direction is then U times a bounded filter, whatever the map).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.generators import generator_on

CHUNK = 2**22  # entries of a Gaussian map that exist at a time
CACHED = 2**18  # numbers that stay in a processor's cache


@dataclass(frozen=True)
class Sketch(ABC):
    """`size`: to how many numbers; None takes 16 for each sample. Layers that have no more are not sketched."""

    size: int | None = None
    needs_energy = False

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
    def draw(self, length: int, size: int, generator: torch.Generator, energy: Tensor | None = None) -> Tensor:
        """One map, as numbers to be kept. `energy` [length]: the mean squares of what will be mapped."""

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

    def draw(self, length: int, size: int, generator: torch.Generator, energy: Tensor | None = None) -> Tensor:
        options = {"generator": generator, "device": generator.device}
        places = torch.randint(size, (length,), **options) + 1
        return (places * (1 - 2 * torch.randint(2, (length,), **options))).int()

    def apply(self, drawn: Tensor, x: Tensor, size: int) -> Tensor:
        places, signs = drawn.abs(), drawn.sign()
        result = x.new_zeros(*x.shape[:-1], size + 1)  # the first of which nothing is added to
        columns, sums = x.reshape(-1, x.shape[-1]), result.view(-1, size + 1)
        step = max(1, CACHED // x.shape[-1]) if x.device.type == "cpu" else max(1, len(columns))
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

    def draw(self, length: int, size: int, generator: torch.Generator, energy: Tensor | None = None) -> Tensor:
        return torch.randperm(length, generator=generator, device=generator.device)[:size].sort().values

    def apply(self, drawn: Tensor, x: Tensor, size: int) -> Tensor:
        return x[..., drawn] * (self.length(x) / size) ** 0.5

    @staticmethod
    def length(x: Tensor) -> int:
        return x.shape[-1]


@dataclass(frozen=True)
class RowNorm(Sketch):
    """`size` of the numbers, drawn with probabilities by their mean squares, times 1 / sqrt(size * probability).

    Kept as [2, size]: places and factors.
    """

    needs_energy = True

    def held(self, length: int, size: int) -> int:
        return 16 * size

    def draw(self, length: int, size: int, generator: torch.Generator, energy: Tensor | None = None) -> Tensor:
        assert energy is not None
        energy = energy.double()
        share = energy / energy.sum() if bool(energy.sum() > 0) else torch.full_like(energy, 1 / length)
        edges = share.cumsum(0)  # torch.multinomial takes no more than 2^24 categories
        at = torch.rand(size, generator=generator, dtype=torch.float64, device=energy.device) * edges[-1]
        places = torch.searchsorted(edges, at).clamp_max(length - 1)
        return torch.stack([places.double(), (size * share[places]).rsqrt()])

    def apply(self, drawn: Tensor, x: Tensor, size: int) -> Tensor:
        return x[..., drawn[0].long()] * drawn[1].to(x.dtype)


@dataclass(frozen=True)
class Gaussian(Sketch):
    """Products with `size` vectors of independent normal numbers over sqrt(size); dear: length * size products.

    Kept as one seed: the map is made anew, in portions, whenever it is applied.
    """

    def held(self, length: int, size: int) -> int:
        return 8

    def draw(self, length: int, size: int, generator: torch.Generator, energy: Tensor | None = None) -> Tensor:
        return torch.randint(2**62, (1,), generator=generator, device=generator.device)

    def apply(self, drawn: Tensor, x: Tensor, size: int) -> Tensor:
        generator = generator_on(x.device, int(drawn))
        result = x.new_zeros(*x.shape[:-1], size)
        for part in x.split(max(1, CHUNK // size), -1):
            shape = (part.shape[-1], size)
            # in one precision, whatever x has, so that the map is the same for both
            result += part @ torch.randn(shape, generator=generator, device=x.device).to(x.dtype)
        return result / size**0.5
