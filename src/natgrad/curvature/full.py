"""Full curvature: a layer's whole Fisher block, for layers with few weights.

F [1, d, d] = mean over samples of u u^T with u the per-sample gradient of all d = b*o*i weights of the layer. For a
BatchNorm with c channels it is the 2c x 2c block of SP-NGD's eq. 14, which its predecessor and release invert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from natgrad.curvature.curvature import Cost, Curvature, Extent, Moment
from natgrad.curvature.unitwise import SampleMoment
from natgrad.layers.layer import Layer, Shape
from natgrad.layers.op_cost import OpCost, moment_of, moved
from natgrad.linalg import damped_inverse, first_inverse


@dataclass(frozen=True)
class WholeMoment(SampleMoment):
    """F over all weights of the layer at once."""

    def shape(self, layer: Layer) -> tuple[int, ...]:
        return 1, layer.shape.numel, layer.shape.numel

    def close_work(self, layer: Layer, samples: int) -> tuple[OpCost, ...]:
        return moved(samples * layer.shape.numel, 2, calls=3), moment_of(samples, layer.shape.numel)

    def close(self, parts: list[Tensor]) -> Tensor:
        rows = self.gradients(parts).flatten(1)
        return (rows.mT @ rows).unsqueeze(0)


@dataclass(frozen=True)
class Full(Curvature):
    """One damped block a layer. Its damping is `coefficient` times the layer's (SP-NGD's release has 16)."""

    rows_per_dim: int | None = None
    coefficient: float = 1.0
    name: str = field(default="full", init=False)
    multiplies = True

    @property
    def statistics(self) -> tuple[Moment, ...]:  # type: ignore[override]
        return (WholeMoment(self.rows_per_dim),)

    def split(self, traces: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        return {"F": torch.full_like(traces["F"], self.coefficient * damping)}

    def factor(self, key: str, statistic: Tensor, damping: Tensor) -> tuple[Tensor, Tensor | None]:
        return first_inverse(statistic, damping)

    def mend(self, key: str, statistic: Tensor, damping: Tensor) -> tuple[Tensor, int]:
        return damped_inverse(statistic, damping)

    def precondition(self, inverses: Mapping[str, Tensor], gradient: Tensor, damping: float) -> Tensor:
        layers = gradient.reshape(len(inverses["F"]), -1, 1)
        return (inverses["F"] @ layers).view(gradient.shape)

    def dense(self, statistics: Mapping[str, Tensor], shape: Shape, damping: float) -> Tensor:
        eye = torch.eye(shape.numel, dtype=statistics["F"].dtype)
        return statistics["F"][0] + self.coefficient * damping * eye

    def factor_work(self, layer: Layer, key: str, seen: Extent) -> tuple[OpCost, ...]:
        """A Cholesky factor and the inverse of it, of all weights at once."""
        d = layer.shape.numel
        return (OpCost("inverse", float(d**3), 4.0 * 6 * d * d, d, 8),)

    def precondition_work(self, layer: Layer, seen: Extent) -> tuple[OpCost, ...]:
        return (moved(layer.shape.numel**2, 1, calls=3),)

    def cost(self, layer: Layer, rows: int) -> Cost:
        d = layer.shape.numel
        return Cost(float(rows * d * d), {"F": float(d**3)}, float(d * d), d * d)
