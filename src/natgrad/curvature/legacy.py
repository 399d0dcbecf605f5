"""What the released code of SENG computes instead, for reproducing its recipes (specs: sections 1.3 to 1.7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.curvature.per_sample import Sample
from natgrad.layers.layer import Shape


@dataclass(frozen=True)
class Legacy:
    """The release's ways. Each is worse than what it replaces, and its hyper-parameters were tuned with it.

    Args:
        c: column budget of the release. Sampled rows are scaled by D / c^2 (a side by M / c) where the square root
            would be unbiased, so that curvature counts rho times: (lambda I + rho F)^-1 g with rho of each layer.
        threshold: weights above which a layer is sampled by its sides, not by its weights.
        mean_field: take U b of these layers from sums over samples of each factor alone (40 to 90 % error).
        local: every rank takes the direction by its own samples, and directions are averaged.

    """

    c: int = 256
    threshold: int = 700_000
    mean_field: bool = False
    local: bool = False

    def __post_init__(self):
        if self.c < 1 or self.threshold < 0:
            raise ValueError(
                f"Legacy(c={self.c}, threshold={self.threshold}): give c above 0 and a threshold of at least 0"
            )

    def boost(self, shape: Shape) -> float:
        """Rho, by how much curvature is overrated."""
        if shape.numel <= self.threshold:
            return max(1.0, shape.numel / self.c**2)
        return max(1.0, shape.out / self.c) * max(1.0, shape.inner / self.c)

    def blurs(self, rows: Sample, shape: Shape) -> bool:
        """Whether U b of this layer is taken from sums of factors."""
        return self.mean_field and shape.numel > self.threshold and "right" in rows


def mean_field(rows: Sample, weights: Tensor) -> Tensor:
    """(sum_i s_i left_i)^T (sum_i (b_i / sum_j s_j) right_i) with s = sqrt(|b|), for U b, as W[..., b, o, i]."""
    s = weights.abs().sqrt()
    share = weights / s.sum(-1, keepdim=True).clamp_min(1e-5)
    left = torch.einsum("...n,...nsbo->...bos", s, rows["left"])
    return left @ torch.einsum("...n,...nsbi->...bsi", share, rows["right"])
