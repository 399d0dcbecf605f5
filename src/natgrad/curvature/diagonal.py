"""Diagonal curvature: the mean square of per-sample gradients, for layers too large for anything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from natgrad.curvature.curvature import Cost, Curvature, Extent, Moment
from natgrad.curvature.unitwise import SampleMoment
from natgrad.layers.layer import Layer, Shape
from natgrad.layers.op_cost import OpCost, moved


@dataclass(frozen=True)
class Diagonal(Curvature):
    """F [b*o, i]: one number a weight, damped by addition."""

    rows_per_dim: int | None = None
    name: str = field(default="diagonal", init=False)

    @property
    def statistics(self) -> tuple[Moment, ...]:  # type: ignore[override]
        return (SampleMoment(self.rows_per_dim, diagonal=True),)

    def split(self, traces: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        return {"F": torch.full_like(traces["F"], damping)}

    def factor(self, key: str, statistic: Tensor, damping: Tensor) -> tuple[Tensor, Tensor | None]:
        return 1 / (statistic + damping[:, None]), None

    def precondition(self, inverses: Mapping[str, Tensor], gradient: Tensor, damping: float) -> Tensor:
        return gradient * inverses["F"].reshape(gradient.shape)

    def dense(self, statistics: Mapping[str, Tensor], shape: Shape, damping: float) -> Tensor:
        return torch.diag(statistics["F"].flatten() + damping)

    def factor_work(self, layer: Layer, key: str, seen: Extent) -> tuple[OpCost, ...]:
        return (moved(layer.shape.numel, 4, calls=3),)

    def precondition_work(self, layer: Layer, seen: Extent) -> tuple[OpCost, ...]:
        return (moved(layer.shape.numel, 3, calls=2),)

    def cost(self, layer: Layer, rows: int) -> Cost:
        numel = layer.shape.numel
        return Cost(float(rows * numel), {"F": float(numel)}, float(numel), numel)
