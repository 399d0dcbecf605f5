"""What per-sample curvature takes: gradients of samples, their inner products, directions; and how much is held.

n samples of D = b*o*i weights and s places. Columns are [n, D]; factors [n, s, b, o] and [n, s, b, i].
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from natgrad.curvature.curvature import Extent, part_of
from natgrad.curvature.per_sample import SampleGradients
from natgrad.curvature.unitwise import gradients_work
from natgrad.layers.layer import Layer
from natgrad.layers.norm import Norm
from natgrad.layers.op_cost import NUMBER, OpCost, launched, moved, product


class RowForm(NamedTuple):
    """The rows of a layer, of all ranks: how many samples, and the numbers of each as they are sent and kept."""

    samples: int
    numbers: int
    columns: bool
    token_bytes: int = 0


def form_of(statistic: SampleGradients, layer: Layer, seen: Extent) -> RowForm:
    """Columns for few weights and many places, factors otherwise; of at most the samples that the budget allows."""
    shape, places = layer.shape, seen.places
    most = statistic.most(layer, places)
    n = seen.samples if most is None else min(most, seen.samples)
    if isinstance(layer, Norm):
        return RowForm(n, shape.numel, True)
    if layer.diagonal_inputs and places * shape.out < shape.numel:
        return RowForm(n, places * shape.out, False, 8 * places)
    pair = places * shape.blocks * (shape.out + shape.inner)
    return RowForm(n, pair, False) if shape.numel > pair else RowForm(n, shape.numel, True)


def measure_work(statistic: SampleGradients, layer: Layer, x: Tensor, ranks: int) -> tuple[OpCost, ...]:
    """The gradients of a rank's share of samples in one call on x; norms take those of all."""
    samples, places = layer.count(x)
    most = statistic.most(layer, places)
    n = samples if most is None or isinstance(layer, Norm) else min(part_of(most, ranks), samples)
    if isinstance(layer, Norm) or form_of(statistic, layer, Extent(samples, places)).columns:
        return *gradients_work(layer, x, n, places), moved(n * layer.shape.numel, 2), launched(8)
    outputs = moved(n * places * layer.shape.blocks * layer.shape.out, 2, "gather")
    return *layer.rows_work(x, n * places), outputs, launched(8)


def gram_work(layer: Layer, form: RowForm, places: int, sketched: int | None) -> tuple[OpCost, ...]:
    """K [n, n] from rows, by a sketch to `sketched` numbers or exactly; factors are written out for it."""
    n, d = form.samples, layer.shape.numel
    b, o, i = layer.shape
    written = () if form.columns else (product(o, places, i, n * b, 8), moved(n * d, 1))
    scaled = moved(n * form.numbers, 4, calls=2), launched(16)
    if sketched is None:
        return *scaled, *written, product(n, d, n, 1, 4)
    return *scaled, *written, moved(n * d, 1, "scatter"), launched(8), product(n, sketched, n, 1, 4)


def factor_work(samples: int) -> tuple[OpCost, ...]:
    """The Cholesky factor of K."""
    return (OpCost("cholesky", samples**3 / 3, 4.0 * 3 * samples**2, samples, 6),)


def direction_work(layer: Layer, form: RowForm, sketched: int | None) -> tuple[OpCost, ...]:
    """U^T g, the solve, and U b."""
    n, d = form.samples, layer.shape.numel
    kept = moved(n * form.numbers, 1 if form.columns else 3)
    against = (kept,) if sketched is None else (moved(n * sketched, 1), moved(d, 1, "scatter"), launched(10))
    return *against, moved(n * n, 2), kept, moved(d, 3), launched(14)


def bytes_held(form: RowForm, drawn: int, sketched: int | None) -> int:
    """Rows, what each has of the gradient, K with its factor, and the sketch with its map of `drawn` bytes."""
    n = form.samples
    gram = NUMBER * 2 * n * n
    return sent(form, n) + gram + (0 if sketched is None else drawn + NUMBER * n * sketched)


def sent(form: RowForm, samples: int) -> int:
    """Bytes of so many rows as a rank sends them in single precision: gradients and what the mean has of each."""
    return samples * (NUMBER * (form.numbers + 1) + form.token_bytes)
