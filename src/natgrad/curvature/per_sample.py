"""Rows: something of each sample, here its gradient, as explicit columns or as factors, whichever is smaller.

The gradient of sample n with respect to W[b, o, i] is u_n = sum over places s of left[n, s, b, o] right[n, s, b, i]:
D = b*o*i numbers as a column, s*b*(o + i) as factors. Rows are dictionaries of tensors whose first dimension is n:

    columns [n, D]                                   for few weights and many places
    left [n, s, b, o], right [n, s, b, i]            for many weights and few places
    left [n, s, 1, o], tokens [n, s]                 where right would be one-hot (an embedding; -1 is no input)

beside what they were drawn by (order [n], random keys; chosen [n], places in the batch).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from natgrad.curvature.curvature import Draw, Statistic
from natgrad.layers.layer import Layer, Shape
from natgrad.layers.norm import Norm

Sample = dict[str, Tensor]
AT_ONCE = 2**24  # numbers of a temporary: more would be felt; patches: an eighth, in a fifth less time


class KeptSamples(NamedTuple):
    """What the backward pass needs of an input: the chosen samples of it (None: all) and the call's samples, places."""

    inputs: Any
    chosen: Tensor | None
    samples: int
    places: int


@dataclass(frozen=True)
class Rows(Statistic):
    """Per-sample tensors. `samples`: how many samples of the whole world's batch."""

    draws = "all"

    def shifted(self, part: Sample, before: int) -> Sample:
        return longer(part, before + count(part), before)

    @abstractmethod
    def close(self, parts: list[Sample], shape: Shape) -> Sample:
        """The rows of one backward pass from those of its calls."""

    @abstractmethod
    def most(self, layer: Layer, places: int) -> int | None:
        """How many samples may be kept of a layer with so many places; None: any number."""


@dataclass(frozen=True)
class SampleGradients(Rows):
    """Gradients of at most `samples` samples (None: of all); fewer where rows would take more than `budget` bytes."""

    samples: int | None = None
    budget: int = 2**30
    key = "U"

    def most(self, layer: Layer, places: int) -> int | None:
        afford = max(1, self.budget // (4 * numbers(layer, places)))
        return afford if self.samples is None else min(self.samples, afford)

    def before(self, layer: Layer, x: Tensor, draw: Draw, output: Tensor | None = None) -> KeptSamples:
        samples, places = layer.count(x)
        chosen = draw(samples, self.most(layer, places) or samples)
        if isinstance(layer, Norm):  # all samples: their gradients are few numbers, in the statistics of all
            return KeptSamples(layer.keep(x, None, output), chosen, samples, places)
        return KeptSamples(x if chosen is None else x.index_select(0, chosen), chosen, samples, places)

    def after(self, layer: Layer, kept: KeptSamples, dy: Tensor, draw: Draw) -> Sample:
        x, chosen, samples, _ = kept
        if isinstance(layer, Norm):
            units = layer.unit_gradients(x, dy, None).flatten(1)
            rows = {"columns": units if chosen is None else units[chosen]}
        else:
            dy = dy if chosen is None else dy.index_select(0, chosen)
            rows = factors(layer, x, dy, samples if chosen is None else len(chosen))
        return {**rows, "chosen": torch.arange(samples, device=dy.device) if chosen is None else chosen}

    def close(self, parts: list[Sample], shape: Shape) -> Sample:
        first, *more = parts
        for other in more:  # a sample's calls add up
            first = added(first, other, shape)
        return first


def numbers(layer: Layer, places: int) -> int:
    """How many numbers the gradient of one sample takes."""
    shape = layer.shape
    if isinstance(layer, Norm):
        return shape.numel
    return max(1, min(shape.numel, places * shape.blocks * (shape.out + (1 if layer.diagonal_inputs else shape.inner))))


def factors(layer: Layer, x: Tensor, dy: Tensor, samples: int) -> Sample:
    """Per-sample gradients of one call in the smaller of their forms."""
    shape, places = layer.shape, layer.count(x)[1]
    tokens = layer.tokens(x)
    if tokens is not None and places * shape.out < shape.numel:
        left = layer.output_rows(dy).unflatten(0, (samples, -1))
        return {"left": left, "tokens": tokens.reshape(samples, -1)}
    if shape.numel > places * shape.blocks * (shape.out + shape.inner):
        left, right = (rows.unflatten(0, (samples, -1)) for rows in (layer.output_rows(dy), layer.rows(x)))
        return {"left": left, "right": right}
    step = max(1, AT_ONCE // 8 // max(1, places * shape.blocks * (shape.out + shape.inner)))
    if step >= samples:
        return {"columns": layer.sample_gradients(layer.rows(x), layer.output_rows(dy), samples).flatten(1)}
    pairs = zip(x.split(step), dy.split(step))
    parts = [layer.sample_gradients(layer.rows(a), layer.output_rows(g), len(a)).flatten(1) for a, g in pairs]
    return {"columns": torch.cat(parts)}


def places_of(rows: Sample) -> int:
    """How many places factors have; 0 for columns."""
    return rows["left"].shape[1] if "left" in rows else 0


def conform(rows: Sample, shape: Shape, columns: bool, places: int) -> Sample:
    """Rows as columns, or as factors with so many places, the new ones zero."""
    if columns:
        return rows if "columns" in rows else {**rest_of(rows), "columns": explicit(rows, shape).flatten(1)}
    more = places - places_of(rows)
    if "columns" in rows or more == 0:
        return rows
    result = {**rows, "left": pad(rows["left"], (0, 0, 0, 0, 0, more))}
    if "tokens" in rows:
        return {**result, "tokens": pad(rows["tokens"], (0, more), value=-1)}
    return {**result, "right": pad(rows["right"], (0, 0, 0, 0, 0, more))}


def rest_of(rows: Sample) -> Sample:
    """What rows are beside gradients."""
    return {k: v for k, v in rows.items() if k not in ("columns", "left", "right", "tokens")}


def added(one: Sample, other: Sample, shape: Shape) -> Sample:
    """The gradients of two calls on the same samples as one. The shorter call saw the first samples of the longer."""
    if count(one) != count(other):
        one, other = (one, other) if count(one) > count(other) else (other, one)
        other = longer(other, count(one))
    if "columns" in one or "columns" in other or ("tokens" in one) != ("tokens" in other):
        one, other = (conform(rows, shape, True, 0) for rows in (one, other))
        return {**one, "columns": one["columns"] + other["columns"]}
    second = "tokens" if "tokens" in one else "right"
    return {**one, **{k: torch.cat([one[k], other[k]], 1) for k in ("left", second)}}


def longer(rows: Sample, samples: int, before: int = 0) -> Sample:
    """Rows of so many samples, the new ones (`before` of them in front) with gradients of zero."""
    more = samples - count(rows) - before
    if not (before or more):
        return {name: rows[name] for name in ("columns", "left", "right", "tokens") if name in rows}
    return {
        name: pad(value, (*(0,) * (2 * value.dim() - 2), before, more), value=-1 if name == "tokens" else 0)
        for name, value in rows.items()
        if name in ("columns", "left", "right", "tokens")
    }


def stacked(parts: Sequence[Sample], shape: Shape) -> Sample:
    """The rows of several passes, one behind the other."""
    if len(parts) == 1:
        return parts[0]
    columns, places = any("columns" in p for p in parts), max(places_of(p) for p in parts)
    alike = [conform(p, shape, columns, places) for p in parts]
    return {k: torch.cat([p[k] for p in alike]) for k in alike[0]}


def thinned(rows: Sample, most: int | None) -> Sample:
    """The `most` rows with the smallest keys, in their order: a draw without replacement over all passes."""
    if most is None or len(rows["order"]) <= most:
        return rows
    kept = rows["order"].argsort()[:most].sort().values
    return {k: v[kept] for k, v in rows.items()}


def scaled(rows: Sample, factor: Tensor | float) -> Sample:
    """Gradients times a factor, one [n] or one for all."""
    name = "columns" if "columns" in rows else "left"
    if isinstance(factor, Tensor):
        factor = factor.to(rows[name]).view(-1, *[1] * (rows[name].dim() - 1))
    return {**rows, name: rows[name] * factor}


def explicit(rows: Sample, shape: Shape) -> Tensor:
    """Gradients [n, b, o, i], written out."""
    if "columns" in rows:
        return rows["columns"].view(-1, *shape)
    if "tokens" in rows:
        left, tokens = rows["left"][:, :, 0], rows["tokens"]
        result = left.new_zeros(len(left), shape.inner + 1, shape.out)  # the last one takes what is no input
        index = tokens.remainder(shape.inner + 1).unsqueeze(2).expand_as(left)
        return result.scatter_add_(1, index, left)[:, :-1].transpose(1, 2).unsqueeze(1)
    return torch.einsum("nsbo,nsbi->nboi", rows["left"], rows["right"])


def project(rows: Sample, matrix: Tensor) -> Tensor:
    """The inner products [..., n] of every sample's gradient with W[..., b, o, i], of some layers or of one."""
    if "columns" in rows:
        return times(rows["columns"], matrix.flatten(-3).unsqueeze(-1)).squeeze(-1)
    left = rows["left"]
    if "tokens" in rows:
        if matrix.dim() > 3:
            return torch.stack([project(one, own) for one, own in zip(apart(rows), matrix)])
        seen = torch.cat([matrix[0], matrix.new_zeros(len(matrix[0]), 1)], 1).T
        return (left[:, :, 0] * seen[rows["tokens"].remainder(len(seen))]).flatten(1).sum(1)
    mapped = times(blocks_of(rows["right"]), matrix.mT)  # [..., b, n*s, o]
    mapped = mapped.transpose(-3, -2).unflatten(-3, left.shape[-4:-2])
    return (mapped * left).flatten(-3).sum(-1)


def combine(rows: Sample, weights: Tensor, shape: Shape) -> Tensor:
    """The sum over samples of weights [..., n] times gradients, as W[..., b, o, i], of some layers or of one.

    It is one product, as of a weight gradient.
    """
    if "columns" in rows:
        return times(weights.unsqueeze(-2), rows["columns"]).view(*weights.shape[:-1], *shape)
    if "tokens" in rows and weights.dim() > 1:
        return torch.stack([combine(one, own, shape) for one, own in zip(apart(rows), weights)])
    left = rows["left"] * weights[..., None, None, None]
    if "tokens" in rows:
        result = left.new_zeros(shape.inner + 1, shape.out)
        result.index_add_(0, rows["tokens"].flatten().remainder(shape.inner + 1), left.flatten(0, 2))
        return result[:-1].T.unsqueeze(0)
    return times(blocks_of(left).mT, blocks_of(rows["right"]))


def blocks_of(rows: Tensor) -> Tensor:
    """Factors [..., n, s, b, d] as one matrix for each block, [..., b, n*s, d]."""
    return rows.flatten(-4, -3).transpose(-3, -2)


def times(one: Tensor, other: Tensor) -> Tensor:
    """The product of matrices, which torch's `@` takes thrice as long to prepare where they are many."""
    if one.dim() == 2:
        return torch.mm(one, other)
    if one.dim() == 4 and one.shape[1] == other.shape[1] == 1:
        return torch.bmm(one[:, 0], other[:, 0]).unsqueeze(1)
    return torch.bmm(one, other) if one.dim() == 3 else one @ other


def apart(rows: Sample) -> list[Sample]:
    """The rows of several layers, each by itself."""
    return [dict(zip(rows, own)) for own in zip(*rows.values())]


def gram(rows: Sample, shape: Shape) -> Tensor:
    """The inner products [n, n] of all samples' gradients."""
    if "columns" in rows:
        return rows["columns"] @ rows["columns"].T
    if places_of(rows) == 1 and "right" in rows:  # of a product of two vectors it is the product of two
        left, right = (rows[k][:, 0].transpose(0, 1) for k in ("left", "right"))
        return ((left @ left.transpose(1, 2)) * (right @ right.transpose(1, 2))).sum(0)
    n = len(rows["left"])
    total = rows["left"].new_zeros(n, n)
    for part, form in outputs(rows, shape):
        columns = explicit(part, form).flatten(1)
        total += columns @ columns.T
    return total


def outputs(rows: Sample, shape: Shape):
    """Factors in portions of outputs, such that written out they are not too large, and each portion's shape.

    Tokens are renamed to those that occur.
    """
    inner = shape.inner
    if "tokens" in rows:
        known, renamed = rows["tokens"].unique(return_inverse=True)
        rows, inner = {**rows, "tokens": torch.where(rows["tokens"] < 0, -1, renamed)}, len(known)
    step = max(1, AT_ONCE // max(1, len(rows["left"]) * shape.blocks * inner))
    for part in rows["left"].split(step, 3):
        yield {**rows, "left": part}, Shape(shape.blocks, part.shape[3], inner)


def in_portions(rows: Sample, shape: Shape, work: Callable[[Tensor], Tensor]) -> Tensor:
    """`work` on columns [n, D], so many samples at a time that they are not too large."""
    step = max(1, AT_ONCE // shape.numel)
    parts = [{k: v[start : start + step] for k, v in rows.items()} for start in range(0, count(rows), step)]
    return torch.cat([work(explicit(part, shape).flatten(1)) for part in parts])


def count(rows: Sample) -> int:
    """How many samples."""
    return len(rows["columns"] if "columns" in rows else rows["left"])
