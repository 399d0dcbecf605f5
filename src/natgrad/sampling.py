"""Which rows of a batch are measured: draws that are spread evenly and can be repeated."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from natgrad.curvature.curvature import Draw
from natgrad.generators import generator_on


@dataclass(frozen=True)
class Sampler:
    """Draws places, alike for the same (seed, layer, step, rank, call). `share` is this rank's part of a count."""

    seed: int
    step: int
    rank: int
    share: float

    def draw(self, layer: int, call: int, device: torch.device) -> Draw:
        """The draws of one call of one layer."""
        return Picked(self, layer, call, device)

    def quota(self, wanted: int) -> int:
        """How many of `wanted` samples of all ranks are this rank's to keep."""
        ranks = round(1 / self.share)
        return wanted * (self.rank + 1) // ranks - wanted * self.rank // ranks

    def mix(self, *numbers: int) -> int:
        """One seed of many numbers."""
        value = 0x9E3779B97F4A7C15
        for number in (self.seed, self.step, self.rank, *numbers):
            value = ((value ^ (number + 0x632BE59BD9B4E019)) * 0xFF51AFD7ED558CCD) % 2**64
            value ^= value >> 33
        return value % 2**63


@dataclass(frozen=True)
class Picked(Draw):
    """The draws of one call of one layer."""

    sampler: Sampler
    layer: int
    call: int
    device: torch.device

    def __call__(self, total: int, wanted: int) -> Tensor | None:
        wanted = self._mine(wanted)
        if wanted >= total:
            return None
        seed = self.sampler.mix(self.layer, self.call, wanted)
        return stratified(total, wanted, generator_on(self.device, seed))

    def every(self, total: int, wanted: int) -> slice | None:
        stride = total // self._mine(wanted)
        if stride <= 1:
            return None
        return slice(self.sampler.mix(self.layer, self.call, wanted) % stride, None, stride)

    def _mine(self, wanted: int) -> int:
        return max(1, round(wanted * self.sampler.share))


class Aligned:
    """The draws of one layer's calls in one forward pass, all of them on the same samples.

    `total` is how many samples there are, as the first call says, or one that has as many as the model was `given`.
    """

    def __init__(self, draw: Draw, given: int = 0):
        self.draw, self.given, self.total = draw, given, 0
        self.chosen: Tensor | None = None  # of all samples; None: all of them

    def at(self, offset: int, total: int) -> Window:
        """The draws of a call on samples from `offset` on, of `total`."""
        if not self.total or total == self.given:
            self.total = total
        return Window(self, offset, total)


class Window(Draw):
    """The draws of one call among aligned ones. `before`: how many of the drawn samples come before its own."""

    def __init__(self, aligned: Aligned, offset: int, total: int):
        self.aligned, self.offset, self.total, self.before = aligned, offset, total, 0
        self.drawn = 0  # of how many samples some were chosen; 0: all are measured

    @property
    def strayed(self) -> bool:
        """Whether what was chosen is of more samples than there are, as other calls say."""
        return self.drawn not in (0, self.aligned.total)

    def __call__(self, total: int, wanted: int) -> Tensor | None:
        aligned, most = self.aligned, max(self.total, self.aligned.total)
        chosen = aligned.draw(most, wanted)
        self.drawn = 0 if chosen is None else most
        if not self.strayed:
            aligned.chosen = chosen
        if chosen is None:
            self.before = self.offset
            return None
        if total == most:
            return chosen
        self.before = int((chosen < self.offset).sum())
        return chosen[(chosen >= self.offset) & (chosen < self.offset + total)] - self.offset

    def every(self, total: int, wanted: int) -> slice | None:
        aligned, most = self.aligned, max(self.total, self.aligned.total)
        chosen = aligned.draw.every(most, wanted)
        self.drawn = 0 if chosen is None else most
        if chosen is None:
            self.before = self.offset
            return None
        self.before = len(range(*chosen.indices(self.offset)))
        return slice((chosen.start - self.offset) % chosen.step, None, chosen.step) if self.offset else chosen


def stratified(total: int, wanted: int, generator: torch.Generator) -> Tensor:
    """`wanted` of `total` places, one uniform draw in each of equal strata, ascending (docs/math.md)."""
    device = generator.device
    noise = torch.rand(wanted, generator=generator, dtype=torch.float64, device=device)
    # just below 1, so that the last stratum's draw cannot be rounded up to `total`
    return torch.add(_edges(wanted, device), noise, alpha=1 - 2**-30).mul_(total / wanted).long()


@lru_cache(maxsize=64)
def _edges(wanted: int, device: torch.device) -> Tensor:
    return torch.arange(wanted, dtype=torch.float64, device=device)
