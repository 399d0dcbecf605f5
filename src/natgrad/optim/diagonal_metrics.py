"""Metrics made of mean gradients alone: diagonals that are learned from one step to the next.

They need sums over all parameters, so they belong to the rule of direction and not to curvature, which knows one
layer. Here everything is one flat vector (or what one rank owns of it), in at least single precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

LEAST = 1e-8  # of y.s and s.Hs: below, the diagonal BFGS learns nothing


@dataclass(frozen=True)
class Metric:
    """The identity, and what other metrics are made of: at most one kept vector, all learning in `learn`."""

    name: ClassVar[str] = "identity"
    key: ClassVar[str | None] = None  # the kept vector's name in the state
    start: ClassVar[float] = 0.0
    secant: ClassVar[bool] = False  # learns from y and s, so the last gradient is kept
    sums: ClassVar[int] = 0  # how many sums over all parameters `learn` wants

    def products(self, kept: Tensor, y: Tensor, s: Tensor) -> list[Tensor]:
        """What is to be summed over all parameters before `learn` [`sums` scalars]."""
        return []

    def learn(self, kept: Tensor, g: Tensor, secant: tuple[Tensor, Tensor] | None, sums: Sequence[Tensor]) -> None:
        """Take in the gradient g and, with `secant`, its change y and the weights' s; in place."""

    def inverse(self, kept: Tensor, g: Tensor, steps: int) -> Tensor:
        """The preconditioned gradient after `steps` times of learning."""
        return g.clone()


@dataclass(frozen=True)
class DiagonalBFGS(Metric):
    """h, the diagonal of the BFGS update of diag(h), from 1; q(g) = g / h (arXiv 1812.02886 and its release).

        h <- | h - ((h s)^2 + eps) / (s.(h s) + eps) + (y^2 + eps) / (y.s + eps) |   if y.s and s.(h s) >= 1e-8

    y = g - g' crosses mini-batches.

    Args:
        floor: the least h.
        eps: 1e-8 in the release, which adds it to h in q as well.

    """

    name: ClassVar[str] = "diagonal BFGS"
    key: ClassVar[str | None] = "nlcg_hessian"
    start: ClassVar[float] = 1.0
    secant: ClassVar[bool] = True
    sums: ClassVar[int] = 2
    floor: float = 1e-6
    eps: float = 0.0

    def __post_init__(self):
        if not (self.floor >= 0 and self.eps >= 0 and self.floor + self.eps > 0):
            raise ValueError(
                f"DiagonalBFGS(floor={self.floor}, eps={self.eps}): give numbers of at least 0, one above 0"
            )

    def products(self, kept: Tensor, y: Tensor, s: Tensor) -> list[Tensor]:
        return [torch.dot(y, s), torch.dot(kept * s, s)]

    def learn(self, kept: Tensor, g: Tensor, secant: tuple[Tensor, Tensor] | None, sums: Sequence[Tensor]) -> None:
        if secant is None:
            return
        (y, s), (ys, shs) = secant, sums
        down, up = (kept * s).square_(), y.square()
        if self.eps:
            down, up = down.add_(self.eps), up.add_(self.eps)
        fresh = (
            down.mul_((-1 / (shs + self.eps)).to(kept)).add_(kept).addcmul_(up, (1 / (ys + self.eps)).to(kept)).abs_()
        )
        if self.floor:
            fresh.clamp_min_(self.floor)
        sound = (ys >= LEAST) & (shs >= LEAST) & (ys < math.inf) & (shs < math.inf)
        kept.copy_(torch.where(sound.to(kept.device), fresh, kept))

    def inverse(self, kept: Tensor, g: Tensor, steps: int) -> Tensor:
        if steps <= 1:  # nothing is learned yet: the release's first q is 1, without eps
            return g.clone()
        return g / (kept + self.eps) if self.eps else g / kept


@dataclass(frozen=True)
class SecondMoment(Metric):
    """q(g) = g / (sqrt(v) + eps) with v the mean square of mean gradients, as in Adam (Kingma and Ba 2015).

    Args:
        decay: of the mean square, in [0, 1).
        eps: above 0, in units of the gradient.

    """

    name: ClassVar[str] = "second moment"
    key: ClassVar[str | None] = "nlcg_square"
    decay: float = 0.99
    eps: float = 1e-8

    def __post_init__(self):
        if not (0 <= self.decay < 1 and self.eps > 0):
            raise ValueError(
                f"SecondMoment(decay={self.decay}, eps={self.eps}): give a decay of at least 0 and below 1, eps above 0"
            )

    def learn(self, kept: Tensor, g: Tensor, secant: tuple[Tensor, Tensor] | None, sums: Sequence[Tensor]) -> None:
        kept.lerp_(g.square(), 1 - self.decay)

    def inverse(self, kept: Tensor, g: Tensor, steps: int) -> Tensor:
        return g / (kept / (1 - self.decay**steps)).sqrt_().add_(self.eps)
