"""The noise scale of the gradient: the batch beyond which more samples make little difference.

With G the gradient of the whole distribution and S the covariance of one sample's, the mean over n samples has the
expected square |G|^2 + tr(S) / n. The squares over a share of a step's samples and over all of them tell both, and
tr(S) / |G|^2 is the simple noise scale of McCandlish et al. (2018, arXiv 1812.06162, eq. 2.9 and appendix A.1). Shares
are there anyway: every rank's own gradient, or what the first of several micro-batches has left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from natgrad.readings import together

MEMORY = 0.9  # of running means over steps that measure
NUMBERS = {"signal": 0.0, "noise": 0.0}
"""What the param_groups keep: running sums of |G|^2 and tr(S)."""


class Squares(NamedTuple):
    """Squared norms: of what a share of a step's samples has added to the step's mean gradient, and of that mean."""

    part: float
    whole: float
    share: float
    """Of the samples, between 0 and 1."""

    def apart(self) -> tuple[float, float]:
        """(|G|^2, tr(S) / n), each without bias: E part = share^2 |G|^2 + share tr(S) / n."""
        noise = (self.part - self.share**2 * self.whole) / (self.share - self.share**2)
        return self.whole - noise, noise


def square(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    """The squared norm of all of them together, a scalar in double precision on a device."""
    tensors = list(gradients)
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    return together(torch._foreach_norm(tensors)).square().sum().to(device)


def learn(numbers: Mapping[str, float], squares: Squares, samples: float) -> dict[str, float]:
    """The numbers after one more step of so many samples."""
    signal, noise = squares.apart()
    fresh = {"signal": signal, "noise": noise * samples}
    return {name: MEMORY * numbers[name] + (1 - MEMORY) * value for name, value in fresh.items()}


def scale_of(numbers: Mapping[str, float]) -> float | None:
    """tr(S) / |G|^2 in samples; infinite where no signal is to be seen; None before anything was measured."""
    signal, noise = numbers["signal"], numbers["noise"]
    if not signal and not noise:
        return None
    return max(noise, 0.0) / signal if signal > 0 else math.inf
