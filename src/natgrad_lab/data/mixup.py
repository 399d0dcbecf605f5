"""Running mixup and random erasing with zero (Osawa et al. 2020, section 6.1), on batches on any device.

Running mixup blends each batch with the previous step's already blended one, so an image lives on over several steps:

    x'(t) = l x(t) + (1 - l) x'(t-1),   y'(t) = l y(t) + (1 - l) y'(t-1),   l ~ Beta(alpha, alpha)     (eq. 18-20)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class RunningMixup:
    """Blends a stream of batches, image by image; holds the last blended ones. Images without a partner stay whole:
    the first batch, and what a batch has more than the one before. A shorter batch leaves the others' partners waiting.

    per_sample: one l an image, as in the authors' release, instead of one a batch.
    fresh_majority: l <- max(l, 1 - l), as in the release: the fresh image weighs at least half.
    """

    alpha: float
    per_sample: bool = False
    fresh_majority: bool = False
    _inputs: Tensor | None = None
    _targets: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha:g}: give a number above 0 for Beta(alpha, alpha), such as 0.4")

    def __call__(
        self, inputs: Tensor, labels: Tensor, classes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Inputs [n, ...] and labels [n] as blended inputs and soft targets [n, classes]."""
        targets = F.one_hot(labels, classes).to(inputs.dtype)
        if self._inputs is None or self._targets is None:
            self._inputs, self._targets = inputs, targets
        else:
            share = self.draw(len(inputs) if self.per_sample else 1, generator).to(inputs).expand(len(inputs))
            inputs = blend(self._inputs, inputs, share)
            targets = blend(self._targets, targets, share)
            self._targets = over(self._targets, targets)
            self.keep(inputs)
        return inputs, targets

    def keep(self, inputs: Tensor) -> None:
        """Blend the next batch with these images instead of those that were returned last."""
        self._inputs = inputs if self._inputs is None else over(self._inputs, inputs)

    def kept(self) -> tuple[Tensor, ...]:
        """The inputs and targets that the next batch will be blended with; nothing before the first."""
        return () if self._inputs is None or self._targets is None else (self._inputs, self._targets)

    def take(self, inputs: Tensor, targets: Tensor) -> None:
        """Blend the next batch with these, as `kept` told them."""
        self._inputs, self._targets = inputs, targets

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` shares of the fresh image."""
        alpha = torch.full((2, count), self.alpha, dtype=torch.float64)
        gamma = torch._standard_gamma(alpha, generator=generator)  # torch's Beta takes no generator
        share = gamma[0] / gamma.sum(0).clamp_min(1e-300)
        return torch.maximum(share, 1 - share) if self.fresh_majority else share


def blend(last: Tensor, fresh: Tensor, share: Tensor) -> Tensor:
    """Return share x fresh + (1 - share) x last for the images that have a partner; the others stay."""
    n = min(len(last), len(fresh))
    blended = torch.lerp(last[:n], fresh[:n], share[:n].view(-1, *[1] * (fresh.dim() - 1)))
    return blended if n == len(fresh) else torch.cat((blended, fresh[n:]))


def over(last: Tensor, fresh: Tensor) -> Tensor:
    """`fresh`, and behind it what `last` has more."""
    return fresh if len(fresh) >= len(last) else torch.cat((fresh, last[len(fresh) :]))


def erase(
    inputs: Tensor,
    generator: torch.Generator,
    probability: float = 0.5,
    area: tuple[float, float] = (0.02, 0.25),
    aspect: tuple[float, float] = (0.3, 1.0),
) -> Tensor:
    """Set a rectangle of some images [n, c, h, w] to zero: its share of the image and its aspect drawn uniformly,
    height and width swapped at random, anywhere that it fits.
    """
    n, _, height, width = inputs.shape
    u = torch.rand((6, n), generator=generator, dtype=torch.float64)
    size = (area[0] + u[0] * (area[1] - area[0])) * height * width
    ratio = aspect[0] + u[1] * (aspect[1] - aspect[0])
    ratio = torch.where(u[2] < 0.5, ratio, 1 / ratio)
    tall = (size * ratio).sqrt().round().clamp(1, height)
    wide = (size / ratio).sqrt().round().clamp(1, width)
    top = (u[3] * (height - tall + 1)).floor()
    left = (u[4] * (width - wide + 1)).floor()
    rows, columns = torch.arange(height), torch.arange(width)
    inside_rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
    inside_columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    hit = (u[5] < probability)[:, None, None]
    hole = hit & inside_rows[:, :, None] & inside_columns[:, None, :]
    return inputs.masked_fill(hole.unsqueeze(1).to(inputs.device), 0)
