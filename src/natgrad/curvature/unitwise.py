"""Unit-wise curvature: one Fisher block an output unit, of that unit's own weights (SP-NGD section 4.2).

F [b*o, i, i] = mean over samples of u u^T, u the unit's per-sample gradient [i]. For a normalisation a unit is a
channel with (scale, shift), and the 2x2 block has a closed-form inverse (eq. 15-17).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natgrad.curvature.curvature import (
    LEAST_SAMPLES,
    Cost,
    Curvature,
    Draw,
    Extent,
    Moment,
    block_diagonal,
    part_of,
)
from natgrad.layers.layer import Layer, Shape
from natgrad.layers.norm import Norm, UnitSums
from natgrad.layers.op_cost import OpCost, launched, moved, product
from natgrad.linalg import damped_inverse, first_inverse


class KeptInputs(NamedTuple):
    """What the layer needs of its input, the chosen samples (None: all), and the call's samples and places."""

    inputs: Any
    chosen: slice | None
    samples: int
    places: int


@dataclass(frozen=True)
class SampleMoment(Moment):
    """F from per-sample gradients. Bounded, it takes whole samples: a sample's gradient needs all of its places."""

    key = "F"
    draws = "layer"

    def shape(self, layer: Layer) -> tuple[int, ...]:
        b, o, i = layer.shape
        return b * o, i, i

    def before(self, layer: Layer, x: Tensor, draw: Draw, output: Tensor | None = None) -> KeptInputs:
        samples, places = layer.count(x)
        chosen = None
        if self.rows_per_dim is not None:
            chosen = draw.every(samples, self._wanted(layer, self.rows_per_dim))
        if isinstance(layer, Norm):  # its statistics come from all samples, its rows from the chosen ones
            return KeptInputs(layer.keep(x, chosen, output), chosen, samples, places)
        index = None if chosen is None else _places_of(chosen, samples, places, x.device)
        return KeptInputs(layer.rows(x, index), chosen, samples, places)

    def after(self, layer: Layer, kept: KeptInputs, dy: Tensor, draw: Draw) -> Tensor | UnitSums:
        """Gradients of the chosen samples, each of which stands for `step` samples."""
        inputs, chosen, samples, places = kept
        if isinstance(layer, Norm):
            sums = layer.unit_sums(inputs, dy, chosen)
            return sums if chosen is None else sums._replace(weight=chosen.step**0.5)
        index = None if chosen is None else _places_of(chosen, samples, places, dy.device)
        taken = samples if chosen is None else len(range(samples)[chosen])
        units = layer.sample_gradients(inputs, layer.output_rows(dy, index), taken).flatten(1, 2)
        return units if chosen is None else units.mul_(chosen.step**0.5)

    def taken(self, layer: Layer, samples: int, ranks: int) -> int:
        """How many of a call's samples are measured: one of every so many, as `Draw.every` draws them."""
        if self.rows_per_dim is None:
            return samples
        step = samples // part_of(self._wanted(layer, self.rows_per_dim), ranks)
        return samples if step <= 1 else math.ceil(samples / step)

    def work(self, layer: Layer, x: Tensor, y: Tensor, ranks: int) -> tuple[OpCost, ...]:
        samples, places = layer.count(x)
        n = self.taken(layer, samples, ranks)
        return (*gradients_work(layer, x, n, places), *self.close_work(layer, n))

    def close_work(self, layer: Layer, samples: int) -> tuple[OpCost, ...]:
        """What `close` takes for so many samples."""
        b, o, i = layer.shape
        return moved(samples * b * o * i, 3), launched(4), product(i, samples, i, b * o)

    def _wanted(self, layer: Layer, samples: int) -> int:
        return max(LEAST_SAMPLES, samples * layer.shape.inner)

    def effective_samples(self, layer: Layer, samples: int, predictions: int) -> int:
        if self.rows_per_dim is None:
            return samples
        return math.ceil(samples / max(1, samples // self._wanted(layer, self.rows_per_dim)))

    def shifted(self, part: Tensor | UnitSums, before: int) -> Tensor:
        return super().shifted(written(part), before)

    @staticmethod
    def gradients(parts: Sequence[Any]) -> Tensor:
        """Per-sample gradients [n, b*o, i] of one forward pass: a sample's calls add up before they square.

        A call with fewer samples than others saw the first ones, as the later steps of a packed sequence do.
        """
        units = [written(part) for part in parts]
        if len(units) == 1:
            return units[0]
        total = units[0].new_zeros(max(map(len, units)), *units[0].shape[1:])
        for part in units:
            total[: len(part)] += part
        return total

    def close(self, parts: list[Any]) -> Tensor:
        return self._products(self.gradients(parts))

    def close_all(self, parts: Sequence[list[Any]]) -> list[Tensor]:
        """Units know nothing of each other, so those of all layers that look alike are written out as one product."""
        if type(self).close is not SampleMoment.close:
            return super().close_all(parts)
        units = [own[0] if len(own) == 1 else self.gradients(own) for own in parts]
        alike: dict[Any, list[int]] = {}
        for k, own in enumerate(units):
            kind = own.kind if isinstance(own, UnitSums) else (len(own), own.shape[2], own.dtype, own.device)
            alike.setdefault(kind, []).append(k)
        found: dict[int, Tensor] = {}
        for ks in alike.values():
            own = [units[k] for k in ks]
            counts = [(u.products if isinstance(u, UnitSums) else u).shape[1] for u in own]
            found |= zip(ks, self._products(together(own)).split(counts))
        return [found[k] for k in range(len(parts))]

    def _products(self, units: Tensor) -> Tensor:
        """The sums over samples of what units [n, u, i] make, [u, i, i]."""
        return torch.einsum("nui,nuj->uij", units, units)


def written(part: Tensor | UnitSums) -> Tensor:
    """Per-sample gradients [n, u, i] of one call."""
    return part.written() if isinstance(part, UnitSums) else part


def together(parts: Sequence[Tensor | UnitSums]) -> Tensor:
    """Per-sample gradients of parts of one kind, units behind units."""
    if len(parts) == 1:
        return written(parts[0])
    sums = [part for part in parts if isinstance(part, UnitSums)]
    return UnitSums.joined(sums).written() if sums else torch.cat([written(part) for part in parts], 1)


def gradients_work(layer: Layer, x: Tensor, samples: int, places: int) -> tuple[OpCost, ...]:
    """What the gradients of so many samples of an input like x take, written out."""
    b, o, i = layer.shape
    if isinstance(layer, Norm):  # dy * x, its sum and that of dy: sums over places, as the norm's own
        return moved(samples * places * b, 5, "norm", 2), launched(12)
    outputs = moved(samples * places * b * o, 2, "gather")
    return *layer.rows_work(x, samples * places), outputs, launched(6), product(o, places, i, samples * b, 2)


def _places_of(chosen: slice, samples: int, places: int, device: torch.device) -> Tensor:
    """Rows of all places of the chosen samples."""
    return torch.arange(samples * places, device=device).unflatten(0, (samples, places))[chosen].flatten()


@dataclass(frozen=True)
class UnitWise(Curvature):
    """One damped block an output unit.

    Args:
        rows_per_dim: samples measured for each dimension of a block; None measures all.
        coefficient: damping as a multiple of the layer's (SP-NGD's release: 16).

    """

    rows_per_dim: int | None = None
    coefficient: float = 1.0
    name: str = field(default="unit-wise", init=False)

    @property
    def statistics(self) -> tuple[Moment, ...]:  # type: ignore[override]
        return (SampleMoment(self.rows_per_dim),)

    def split(self, traces: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        return {"F": torch.full_like(traces["F"], self.coefficient * damping)}

    def factor(self, key: str, statistic: Tensor, damping: Tensor) -> tuple[Tensor, Tensor | None]:
        return first_inverse(statistic, damping)

    def mend(self, key: str, statistic: Tensor, damping: Tensor) -> tuple[Tensor, int]:
        return damped_inverse(statistic, damping)

    def precondition(self, inverses: Mapping[str, Tensor], gradient: Tensor, damping: float) -> Tensor:
        units = gradient.flatten(0, 1).unsqueeze(1)
        return torch.bmm(units, inverses["F"]).reshape(gradient.shape)

    def dense(self, statistics: Mapping[str, Tensor], shape: Shape, damping: float) -> Tensor:
        eye = torch.eye(shape.inner, dtype=statistics["F"].dtype)
        return block_diagonal(statistics["F"] + self.coefficient * damping * eye)

    def factor_work(self, layer: Layer, key: str, seen: Extent) -> tuple[OpCost, ...]:
        """The closed form of 2x2 blocks is some passes over them; larger ones have Cholesky factors."""
        b, o, i = layer.shape
        if i <= 2:
            return (moved(b * o * i * i, 12, calls=25),)
        return (OpCost("inverse", float(b * o * i**3), 4.0 * 6 * b * o * i * i, i, 8),)

    def precondition_work(self, layer: Layer, seen: Extent) -> tuple[OpCost, ...]:
        b, o, i = layer.shape
        return (moved(b * o * i * (i + 2), 1, calls=3),)

    def cost(self, layer: Layer, rows: int) -> Cost:
        b, o, i = layer.shape
        units = b * o
        return Cost(float(rows * units * i * i), {"F": float(units * i**3)}, float(units * i * i), units * i * i)
