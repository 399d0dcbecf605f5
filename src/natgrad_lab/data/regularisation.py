"""What is done to a batch against overfitting, in SP-NGD's order: running mixup, then erasing (section 6.1)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad_lab.data.mixup import RunningMixup, erase


@dataclass(frozen=True)
class Regularisation:
    """Which of the two a recipe uses, and how; without a word, neither."""

    mixup: float = 0.0
    """Alpha of the Beta distribution from which running mixup draws its shares; 0: no mixup."""
    per_sample: bool = False
    """Draw a share for each sample (the release), not one for all samples that a rank takes at once."""
    fresh_majority: bool = False
    """Let the fresh image weigh at least one half (the release)."""
    erase: float = 0.0
    """Probability that a rectangle of an image is set to zero; 0: no erasing."""
    area: tuple[float, float] = (0.02, 0.25)
    """Least and largest share of the image that is erased."""
    aspect: tuple[float, float] = (0.3, 1.0)
    """Least and largest ratio of the rectangle's sides."""
    keep_erased: bool = False
    """Blend the next batch with erased images, whose holes live on (the release), not with whole ones (the paper)."""

    def check(self) -> None:
        """Raise a ValueError for what cannot be drawn, and for options of what is switched off."""
        if not 0 <= self.mixup < float("inf"):
            raise ValueError(
                f"mixup={self.mixup:g} must not be negative; set --regularisation.mixup 0.4, or 0 for none"
            )
        if not 0 <= self.erase <= 1:
            raise ValueError(f"erase={self.erase:g} must be a probability; set --regularisation.erase 0.5")
        for name in ("area", "aspect"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name}=({low:g}, {high:g}) must rise between 0 and 1; set --regularisation.{name}")
        for name in ("per_sample", "fresh_majority", "keep_erased"):
            if getattr(self, name) and not self.mixup:
                raise ValueError(f"{name} says nothing without mixup; set --regularisation.mixup 0.4")
        if self.keep_erased and not self.erase:
            raise ValueError("keep_erased says nothing without erasing; set --regularisation.erase 0.5")


class Regulariser:
    """A Regularisation at work: remembers the last blended images of each part of this rank's share.

    Memory: with mixup, the rank's whole share of a batch as floats.
    """

    def __init__(self, settings: Regularisation, classes: int) -> None:
        settings.check()
        self.settings, self.classes = settings, classes
        self.mixups: dict[int, RunningMixup] = defaultdict(self._mixup)

    def _mixup(self) -> RunningMixup:
        return RunningMixup(self.settings.mixup, self.settings.per_sample, self.settings.fresh_majority)

    def __call__(self, part: int, inputs: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs [n, c, h, w] and labels [n] of a share's part as blended ones; targets [n, classes] under mixup."""
        settings, targets = self.settings, labels
        if settings.mixup:
            inputs, targets = self.mixups[part](inputs, labels, self.classes, generator)
        if settings.erase:
            inputs = erase(inputs, generator, settings.erase, settings.area, settings.aspect)
            if settings.keep_erased:
                self.mixups[part].keep(inputs)
        return inputs, targets
