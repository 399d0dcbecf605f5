"""No curvature: the gradient itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from natgrad.curvature.curvature import Cost, Curvature, Extent, Moment
from natgrad.layers.layer import Layer, Shape
from natgrad.layers.op_cost import OpCost, moved


@dataclass(frozen=True)
class Identity(Curvature):
    """F = I, undamped: SGD's direction for this layer."""

    rows_per_dim: int | None = None
    name: str = field(default="identity", init=False)
    statistics: tuple[Moment, ...] = field(default=(), init=False)

    def split(self, traces: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        return {}

    def factor(self, key: str, statistic: Tensor, damping: Tensor) -> tuple[Tensor, Tensor | None]:
        raise KeyError(key)

    def precondition(self, inverses: Mapping[str, Tensor], gradient: Tensor, damping: float) -> Tensor:
        return gradient.clone()

    def dense(self, statistics: Mapping[str, Tensor], shape: Shape, damping: float) -> Tensor:
        return torch.eye(shape.numel, dtype=torch.float64)

    def precondition_work(self, layer: Layer, seen: Extent) -> tuple[OpCost, ...]:
        return (moved(layer.shape.numel, 2),)

    def cost(self, layer: Layer, rows: int) -> Cost:
        return Cost(0.0, {}, float(layer.shape.numel), 0)
