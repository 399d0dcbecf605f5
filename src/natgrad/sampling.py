"""Which rows of a batch are measured: draws that are spread evenly and can be repeated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.curvature.base import Draw


@dataclass(frozen=True)
class Sampler:
    """Draws places, alike for the same (seed, layer, step, rank, call). `share` is this rank's part of a count."""

    seed: int
    step: int
    rank: int
    share: float

    def draw(self, layer: int, call: int, device: torch.device) -> Draw:
        """The draws of one call of one layer."""

        def pick(total: int, wanted: int) -> Tensor | None:
            wanted = max(1, round(wanted * self.share))
            if wanted >= total:
                return None
            generator = torch.Generator(device).manual_seed(self.mix(layer, call, wanted))
            return stratified(total, wanted, generator)

        return pick

    def mix(self, *numbers: int) -> int:
        """One seed of many numbers."""
        value = 0x9E3779B97F4A7C15
        for number in (self.seed, self.step, self.rank, *numbers):
            value = ((value ^ (number + 0x632BE59BD9B4E019)) * 0xFF51AFD7ED558CCD) % 2**64
            value ^= value >> 33
        return value % 2**63


def stratified(total: int, wanted: int, generator: torch.Generator) -> Tensor:
    """`wanted` of `total` places, one uniform draw in each of equal strata, ascending (docs/math.md)."""
    device = generator.device
    noise = torch.rand(wanted, generator=generator, dtype=torch.float64, device=device)
    edges = torch.arange(wanted, dtype=torch.float64, device=device)
    return ((edges + noise) * (total / wanted)).long().clamp_(max=total - 1)
