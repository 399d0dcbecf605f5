"""How much of the last direction a conjugate direction keeps: functions of a few inner products over all parameters.

d = -q(g) + beta d', with q(.) the preconditioner, g the gradient, d' the last direction, g' the last gradient, q' the
last preconditioner and y = g - g'. The products use q instead of the identity in the classical formulas (Fletcher and
Reeves 1964; Polak and Ribiere 1969; Hestenes and Stiefel 1952; Dai and Yuan 1999; Hager and Zhang 2005).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TINY = 1e-30  # d'.y below it says nothing


class Products(NamedTuple):
    """Inner products over all parameters on all ranks, in double precision; NaN where no beta has asked for one.

    They are on the parameters' device: a formula that branches on one makes the host wait.
    """

    gqg: Tensor
    """g . q(g)"""
    old: Tensor
    """g' . q'(g') of the last step, kept from zero"""
    gz: Tensor
    """g . q'(g')"""
    qy: Tensor
    """q(g) . y"""
    dy: Tensor
    """d' . y"""
    dg: Tensor
    """d' . g"""
    yqy: Tensor
    """y . q(y)"""


EXTRA = frozenset({"gz", "qy", "yqy"})
"""The products that cost a pass or a vector of their own; the others are always there."""


@dataclass(frozen=True)
class Beta:
    """A formula and which of the extra products it reads. A plain function of Products is given all of them."""

    name: str
    formula: Callable[[Products], Tensor]
    needs: frozenset[str] = frozenset()

    def __call__(self, products: Products) -> Tensor:
        return self.formula(products)


def needs_of(beta: Callable[[Products], Tensor | float]) -> frozenset[str]:
    """The extra products that a beta reads."""
    return beta.needs if isinstance(beta, Beta) else EXTRA


def _over_dy(value: Tensor, p: Products) -> Tensor:
    """Value / d'.y, and 0 where the step has not met positive curvature."""
    return torch.where(p.dy > TINY, value / p.dy, 0.0)


def _hz(p: Products) -> Tensor:
    return _over_dy(p.qy, p) - 2 * _over_dy(_over_dy(p.yqy * p.dg, p), p)


def _hs_dy(p: Products) -> Tensor:
    return torch.minimum(_over_dy(p.qy, p), _over_dy(p.gqg, p)).clamp_min(0)


fletcher_reeves = Beta("fletcher_reeves", lambda p: p.gqg / p.old)
"""g . q(g) / g' . q'(g')."""
polak_ribiere = Beta("polak_ribiere", lambda p: (p.gqg - p.gz) / p.old, frozenset({"gz"}))
"""[g . q(g) - g . q'(g')] / g' . q'(g'); one vector more."""
hestenes_stiefel = Beta("hestenes_stiefel", lambda p: _over_dy(p.qy, p), frozenset({"qy"}))
"""q(g) . y / d' . y; 0 where d' . y is not positive."""
dai_yuan = Beta("dai_yuan", lambda p: _over_dy(p.gqg, p))
"""g . q(g) / d' . y; 0 where d' . y is not positive."""
hs_dy = Beta("hs_dy", _hs_dy, frozenset({"qy"}))
"""The smaller of hestenes_stiefel and dai_yuan, at least 0."""
hager_zhang = Beta("hager_zhang", _hz, frozenset({"qy", "yqy"}))
"""q(g) . y / d' . y - 2 y . q(y) d' . g / (d' . y)^2; 0 where d' . y is not positive."""

BETAS = {b.name: b for b in (fletcher_reeves, polak_ribiere, hestenes_stiefel, dai_yuan, hs_dy, hager_zhang)}
