"""Unit-wise curvature: one Fisher block an output unit, of that unit's own weights (SP-NGD section 4.2).

F [b*o, i, i] = mean over samples of u u^T, u the unit's per-sample gradient [i]. For a normalisation a unit is a
channel with (scale, shift), and the 2x2 block has a closed-form inverse (eq. 15-17).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natgrad.curvature.base import LEAST_SAMPLES, Cost, Curvature, Draw, Moment, block_diagonal
from natgrad.layers.base import Layer, Shape
from natgrad.layers.norm import Norm
from natgrad.linalg import damped_inverse


class Kept(NamedTuple):
    """What the layer needs of its input, the chosen samples (None: all), and the call's samples and places."""

    inputs: Any
    chosen: slice | None
    samples: int
    places: int


@dataclass(frozen=True)
class SampleMoment(Moment):
    """F from per-sample gradients. Bounded, it takes whole samples: a sample's gradient needs all of its places."""

    diagonal: bool = False
    key = "F"

    def shape(self, layer: Layer) -> tuple[int, ...]:
        b, o, i = layer.shape
        return (b * o, i) if self.diagonal else (b * o, i, i)

    def before(self, layer: Layer, x: Tensor, draw: Draw, output: Tensor | None = None) -> Kept:
        samples, places = layer.count(x)
        chosen = None
        if self.samples is not None:
            chosen = draw.every(samples, self._wanted(layer, self.samples))
        if isinstance(layer, Norm):  # its statistics come from all samples, its rows from the chosen ones
            return Kept(layer.keep(x, chosen, output), chosen, samples, places)
        index = None if chosen is None else _places_of(chosen, samples, places, x.device)
        return Kept(layer.rows(x, index), chosen, samples, places)

    def after(self, layer: Layer, kept: Kept, dy: Tensor, draw: Draw) -> Tensor:
        inputs, chosen, samples, places = kept
        if isinstance(layer, Norm):
            units = layer.unit_gradients(inputs, dy, chosen)
        else:
            index = None if chosen is None else _places_of(chosen, samples, places, dy.device)
            taken = samples if chosen is None else len(range(samples)[chosen])
            units = layer.sample_gradients(inputs, layer.output_rows(dy, index), taken).flatten(1, 2)
        return units if chosen is None else units.mul_(chosen.step**0.5)  # each stands for `step` samples

    def _wanted(self, layer: Layer, samples: int) -> int:
        return max(LEAST_SAMPLES, samples * layer.shape.inner)

    def behind(self, layer: Layer, samples: int) -> int:
        if self.samples is None:
            return samples
        return math.ceil(samples / max(1, samples // self._wanted(layer, self.samples)))

    @staticmethod
    def gradients(parts: list[Tensor]) -> Tensor:
        """Per-sample gradients [n, b*o, i] of one backward pass: a sample's calls add up before they square."""
        same = all(p.shape == parts[0].shape for p in parts)
        return torch.stack(parts).sum(0) if same else torch.cat(parts)

    def close(self, parts: list[Tensor]) -> Tensor:
        units = self.gradients(parts)
        if self.diagonal:
            return units.square().sum(0)
        return torch.einsum("nui,nuj->uij", units, units)


def _places_of(chosen: slice, samples: int, places: int, device: torch.device) -> Tensor:
    """Rows of all places of the chosen samples."""
    return torch.arange(samples * places, device=device).unflatten(0, (samples, places))[chosen].flatten()


@dataclass(frozen=True)
class UnitWise(Curvature):
    """One damped block an output unit. Its damping is `coefficient` times the layer's (SP-NGD's release has 16)."""

    samples: int | None = None
    coefficient: float = 1.0
    name: str = field(default="unit-wise", init=False)

    @property
    def statistics(self) -> tuple[Moment, ...]:  # type: ignore[override]
        return (SampleMoment(self.samples),)

    def split(self, traces: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        return {"F": torch.full_like(traces["F"], self.coefficient * damping)}

    def factor(self, key: str, statistic: Tensor, damping: Tensor) -> tuple[Tensor, int]:
        return damped_inverse(statistic, damping)

    def precondition(self, inverses: Mapping[str, Tensor], gradient: Tensor, damping: float) -> Tensor:
        units = gradient.flatten(0, 1).unsqueeze(1)
        return (units @ inverses["F"]).reshape(gradient.shape)

    def dense(self, statistics: Mapping[str, Tensor], shape: Shape, damping: float) -> Tensor:
        eye = torch.eye(shape.inner, dtype=statistics["F"].dtype)
        return block_diagonal(statistics["F"] + self.coefficient * damping * eye)

    def cost(self, layer: Layer, rows: int) -> Cost:
        b, o, i = layer.shape
        units = b * o
        return Cost(float(rows * units * i * i), {"F": float(units * i**3)}, float(units * i * i), units * i * i)
