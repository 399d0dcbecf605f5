"""Kronecker-factored curvature, F ~ G (x) A for each block of a layer (SP-NGD section 3.3).

A [b, i, i] = mean over samples and places of a a^T, over those that have a gradient: a row with g = 0 adds nothing to
F = sum g g^T (x) a a^T, so a padded place has no say in A either. G [b, o, o] = mean over samples of the sum over
places of g g^T (1/(hw) sits on A, as in the paper). The damped inverse is (G + sqrt(l)/pi I)^-1 (x)
(A + pi sqrt(l) I)^-1 with pi^2 the ratio of the factors' mean eigenvalues (eq. 12). A side of more than `max_size`
keeps only its diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from natgrad.curvature.curvature import (
    EXACT_ROWS,
    LEAST_ROWS,
    ROWS_OF_A_SAMPLE,
    WORTH,
    Cost,
    Curvature,
    Draw,
    Extent,
    Moment,
    RowSum,
    block_diagonal,
    part_of,
    wanted_rows,
)
from natgrad.layers.layer import Layer, Shape, all_counted, counted, gram_cost, moment
from natgrad.layers.op_cost import OpCost, launched, moment_of, moved, product
from natgrad.linalg import damped_inverse, first_inverse
from natgrad.triangles import times

MOST_PI = 0.4
"""The largest pi is this power of the largest number. There both factors are nothing beside their damping (gradients of
1e-16 and less in single precision), and a larger pi would only leave the range of numbers."""


class LiveInput(NamedTuple):
    """A call's input, and how often it had been written to."""

    x: Tensor
    version: int


def among(index: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Places `index` [m] that were drawn of all, moved to those that are `live` [total], and their weights [m].

    The r-th live place takes the draws of a stretch of the places; its weight is one over their number, so that it
    is as likely as the others on average. Where all are live, nothing moves. Without any live place weights are 0.
    """
    total, order = len(live), live.cumsum(0)
    count = order[-1]
    rank = (index * count).div(total, rounding_mode="floor")
    some = count.clamp_min(1)
    ends = [((rank + k) * total + some - 1).div(some, rounding_mode="floor") for k in (0, 1)]
    places = torch.searchsorted(order, rank + 1).clamp_max(total - 1)
    return places, (count > 0) / (ends[1] - ends[0])


@dataclass(frozen=True)
class InputMoment(Moment):
    """A. Bounded, it takes `rows_per_dim` * i rows of all samples and places, or all rows if that is cheaper."""

    diagonal: bool = False
    key = "A"
    order = 0

    def shape(self, layer: Layer) -> tuple[int, ...]:
        b, _, i = layer.shape
        return (b, i) if self.diagonal else (b, i, i)

    def before(self, layer: Layer, x: Tensor, draw: Draw, output: Tensor | None = None) -> Tensor | LiveInput:
        """The sum over all rows, by which calls weigh. Where rows count by their gradients, the input, which autograd
        keeps for the gradient of the weight anyway.
        """
        return LiveInput(x, x._version) if layer.counts_live else self._of_all(layer, x, draw)

    def after(self, layer: Layer, kept: Tensor | LiveInput, dy: Tensor, draw: Draw) -> Tensor | RowSum:
        if isinstance(kept, Tensor):
            return kept
        x, sizes = kept.x, layer.row_sizes(dy)
        if x._version != kept.version:  # overwritten since: there is nothing to look at
            return dy.new_full(self.shape(layer), math.nan)
        if all_counted(sizes) and not layer.uneven:
            return self._of_all(layer, x, draw)
        live = counted(sizes)
        if self.diagonal:
            return RowSum(layer.live_squares(x, live), layer.live_rows(live))
        index = self._drawn(layer, x, draw)
        if index is None:
            return RowSum(layer.live_total(x, live), layer.live_rows(live))
        index, weights = among(index, live)
        rows, share = layer.rows(x, index), len(live) / len(index)
        total = moment(rows * weights.sqrt().to(rows.dtype).view(-1, 1, 1), mean=False)
        return RowSum(total.mul_(share), weights.sum(dtype=torch.float64).mul(share).view(1))

    def _of_all(self, layer: Layer, x: Tensor, draw: Draw) -> Tensor:
        """The sum over all rows, or of some rows as much as it would be of all."""
        samples, places = layer.count(x)
        total = samples * places
        if self.diagonal:
            return layer.mean_square(x).mul_(total)
        index = self._drawn(layer, x, draw)
        if index is None:
            return layer.moment_total(x)
        return moment(layer.rows(x, index), mean=False).mul_(total / len(index))

    def _drawn(self, layer: Layer, x: Tensor, draw: Draw) -> Tensor | None:
        """Some of a call's rows; None: all of them, by themselves or because that is cheaper."""
        (samples, places), (b, _, i) = layer.count(x), layer.shape
        index = None if self.rows_per_dim is None else draw(samples * places, wanted_rows(self.rows_per_dim, i))
        cheaper = index is None or layer.second_moment_cost(x) <= b * gram_cost(len(index), i)
        return None if cheaper else index

    def work(self, layer: Layer, x: Tensor, y: Tensor, ranks: int) -> tuple[OpCost, ...]:
        live = (moved(y.numel(), 1), launched(2)) if layer.counts_live else ()
        if self.diagonal:
            return *live, moved(x.numel(), 2, calls=4)
        if self.rows_per_dim is None:
            return *live, *layer.second_moment_work(x)
        b, _, i = layer.shape
        samples, places = layer.count(x)
        rows = part_of(wanted_rows(self.rows_per_dim, i), ranks)
        if rows >= samples * places or layer.second_moment_cost(x) <= b * gram_cost(rows, i):
            return *live, *layer.second_moment_work(x)
        return *live, *layer.rows_work(x, rows), launched(6), moment_of(rows, i, b)

    def effective_samples(self, layer: Layer, samples: int, predictions: int) -> int:
        if self.rows_per_dim is None or self.diagonal:
            return predictions
        return min(predictions, wanted_rows(self.rows_per_dim, layer.shape.inner) // 2, WORTH * self.rows_per_dim)


@dataclass(frozen=True)
class OutputMoment(Moment):
    """G. It is cheap, so bounded it is exact up to EXACT_ROWS rows and takes max(LEAST_ROWS, 32 o) beyond."""

    diagonal: bool = False
    key = "G"

    def shape(self, layer: Layer) -> tuple[int, ...]:
        b, o, _ = layer.shape
        return (b, o) if self.diagonal else (b, o, o)

    def before(self, layer: Layer, x: Tensor, draw: Draw, output: Tensor | None = None) -> int:
        samples, places = layer.count(x)
        return samples * places

    def after(self, layer: Layer, kept: int, dy: Tensor, draw: Draw) -> Tensor:
        index = None
        if self.rows_per_dim is not None and kept > EXACT_ROWS:
            index = draw(kept, self._wanted(layer))
        if index is None:
            return layer.output_rows(dy).square().sum(0) if self.diagonal else layer.output_moment(dy)
        weights = None
        if layer.counts_live and not all_counted(sizes := layer.row_sizes(dy)):
            index, weights = among(index, counted(sizes))
        rows = layer.output_rows(dy, index)
        if weights is not None:
            rows = rows * weights.sqrt().to(rows.dtype).view(-1, 1, 1)
        total = rows.square().sum(0) if self.diagonal else moment(rows, mean=False)
        return total * (kept / len(index))

    def work(self, layer: Layer, x: Tensor, y: Tensor, ranks: int) -> tuple[OpCost, ...]:
        b, o, _ = layer.shape
        samples, places = layer.count(x)
        rows = samples * places
        sampled = self.rows_per_dim is not None and rows > EXACT_ROWS and part_of(self._wanted(layer), ranks) < rows
        if sampled:
            rows = part_of(self._wanted(layer), ranks)
        product_of_rows = moved(rows * b * o, 2, calls=3) if self.diagonal else moment_of(rows, o, b)
        return (moved(rows * b * o, 2, "gather"), launched(8), product_of_rows) if sampled else (product_of_rows,)

    def _wanted(self, layer: Layer) -> int:
        return max(LEAST_ROWS, 32 * layer.shape.out)

    def effective_samples(self, layer: Layer, samples: int, predictions: int) -> int:
        return predictions if self.rows_per_dim is None else min(predictions, self._wanted(layer) // ROWS_OF_A_SAMPLE)


@dataclass(frozen=True)
class Kronecker(Curvature):
    """Two factors, each full or diagonal, divided by the trace-norm pi."""

    rows_per_dim: int | None = None
    diagonal_a: bool = False
    diagonal_g: bool = False
    name: str = field(default="kronecker", init=False)
    multiplies = True

    @property
    def statistics(self) -> tuple[Moment, ...]:  # type: ignore[override]
        return InputMoment(self.rows_per_dim, self.diagonal_a), OutputMoment(self.rows_per_dim, self.diagonal_g)

    def split(self, traces: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        a, g = traces["A"], traces["G"]
        usable = (a > 0) & (g > 0)  # a layer without signal has no ratio to go by
        pi = torch.where(usable, a / torch.where(usable, g, 1), 1).sqrt()
        pi = pi.clamp_max(torch.finfo(pi.dtype).max ** MOST_PI)
        root = damping**0.5
        return {"A": pi * root, "G": root / pi}

    def factor(self, key: str, statistic: Tensor, damping: Tensor) -> tuple[Tensor, Tensor | None]:
        if statistic.dim() == 2:
            return 1 / (statistic + damping[:, None]), None
        return first_inverse(statistic, damping)

    def mend(self, key: str, statistic: Tensor, damping: Tensor) -> tuple[Tensor, int]:
        return damped_inverse(statistic, damping)

    def precondition(self, inverses: Mapping[str, Tensor], gradient: Tensor, damping: float) -> Tensor:
        a, g = inverses["A"], inverses["G"]
        left = times(g, gradient) if g.dim() == 3 else g.unsqueeze(2) * gradient
        return times(left, a) if a.dim() == 3 else left * a.unsqueeze(1)

    def dense(self, statistics: Mapping[str, Tensor], shape: Shape, damping: float) -> Tensor:
        full = {k: v if v.dim() == 3 else torch.diag_embed(v) for k, v in statistics.items()}
        traces = {k: v.diagonal(dim1=1, dim2=2).mean(1) for k, v in full.items()}
        parts = self.split(traces, damping)
        a, g = (full[k] + torch.diag_embed(parts[k][:, None].expand(full[k].shape[:2])) for k in ("A", "G"))
        return block_diagonal(torch.stack([torch.kron(gb, ab) for ab, gb in zip(a, g)]))

    def _sides(self, layer: Layer) -> dict[str, tuple[int, bool]]:
        """The dimension of each factor, and whether it is diagonal."""
        return {"A": (layer.shape.inner, self.diagonal_a), "G": (layer.shape.out, self.diagonal_g)}

    def factor_work(self, layer: Layer, key: str, seen: Extent) -> tuple[OpCost, ...]:
        """A Cholesky factor and the inverse of it: d^3 operations, a third and two."""
        side, diagonal = self._sides(layer)[key]
        blocks = layer.shape.blocks
        if diagonal:
            return (moved(blocks * side, 3, calls=2),)
        return (OpCost("inverse", float(blocks * side**3), 4.0 * 6 * blocks * side**2, side, 8),)

    def precondition_work(self, layer: Layer, seen: Extent) -> tuple[OpCost, ...]:
        """One product with each factor (SP-NGD eq. 12)."""
        b, o, i = layer.shape
        left = moved(b * o * i, 3) if self.diagonal_g else product(o, o, i, b)
        return left, moved(b * o * i, 3) if self.diagonal_a else product(o, i, i, b)

    def cost(self, layer: Layer, rows: int) -> Cost:
        b, o, i = layer.shape
        a_rows = rows if self.rows_per_dim is None else min(rows, wanted_rows(self.rows_per_dim, i))
        g_rows = rows if self.rows_per_dim is None or rows <= EXACT_ROWS else max(LEAST_ROWS, 32 * o)
        a_side, g_side = (1 if self.diagonal_a else i), (1 if self.diagonal_g else o)
        return Cost(
            measure=b * (a_rows * i * a_side + g_rows * o * g_side),
            factors={"A": float(b * a_side**3), "G": float(b * g_side**3)},
            precondition=b * o * i * (a_side + g_side),
            numbers=b * (i * a_side + o * g_side),
        )
