"""Fully connected layers: the last dimension is the input, the first the samples, all between are shared places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from natgrad.layers.layer import (
    Layer,
    Shape,
    counted,
    he_scale,
    layer_of,
    pack_columns,
    promote,
    row_sizes,
    split_pair,
    take,
    weight_and_bias,
    with_ones,
)
from natgrad.layers.use import Form, Matrix, Use


class Linear(Layer):
    """nn.Linear: one block W[1, out, in (+1)] (SP-NGD section 3.3.1; the bias in homogeneous coordinates).

    weight, bias: the module's, unless given. transposed: the weight is [in, out].
    """

    kind = "linear"
    free = 1

    def __init__(self, module: Any, weight: Any = None, bias: Any = None, transposed: bool = False):
        if weight is None:
            weight, *rest = weight_and_bias(module)
            bias = rest[0] if rest else None
        self.biased, self.transposed = bias is not None, transposed
        out, inner = reversed(weight.shape) if transposed else weight.shape
        parameters = (weight,) if bias is None else (weight, bias)
        super().__init__(module, Shape(1, out, inner + self.biased), parameters, he_scale(inner))

    def form(self, use: Use) -> Form | None:
        if use.does == "shift":
            return self._bias_alone(use)
        if use.does not in ("linear", "left", "embedding") or use.part.place:
            return None
        chosen = use.part.matrix(self.parameters[0].shape[1])
        if chosen is None:
            return None
        if use.does == "embedding":
            direct = chosen.turned != self.transposed and not self.biased
            return Form(Lookup(self, chosen, use.options.get("padding_idx")), use.x) if direct else None
        turned = use.does == "left"
        x = use.x.transpose(-1, -2) if turned else use.x
        if chosen.turned != self.transposed:
            return None if use.bias else Form(Exchanged(self, chosen), x, late=True, turned=turned)
        form = LinearPart(self, chosen, use.bias is not None)
        if use.bias is not None and (use.bias.offset, use.bias.size) != (form.outputs.start, (form.width,)):
            return None
        entire = form.width == self.shape.out and form.inputs == slice(0, self.shape.inner - self.biased)
        return Form(self if entire and form.adds == self.biased else form, x, turned=turned)

    def _bias_alone(self, use: Use) -> Form | None:
        """The bias is added by itself: a call of the layer on zeros."""
        size = [n for n in use.part.size if n != 1]
        if use.part.place != 1 or size != [self.shape.out] or not use.part.full:
            return None
        turned = use.part.size[-1] == 1
        shape = (use.x.transpose(-1, -2) if turned else use.x).shape
        if not shape or shape[-1] != self.shape.out:
            return None
        times = use.part.times
        form = (
            self
            if use.part.plain
            else ScaledBias(self, times if isinstance(times, Tensor) else use.x.new_tensor(times))
        )
        return Form(form, use.x.new_zeros(()).expand(*shape[:-1], self.shape.inner - 1), turned=turned)

    def chains(self, place: int) -> bool:
        return place == 1

    def count(self, x: Tensor) -> tuple[int, int]:
        samples = x.shape[0] if x.dim() > 1 else 1
        return samples, x.numel() // (samples * x.shape[-1]) if x.numel() else 0

    def rows(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        return with_ones(promote(take(x.reshape(-1, x.shape[-1]), index)).unsqueeze(1), self.biased)

    def output_rows(self, dy: Tensor, index: Tensor | None = None) -> Tensor:
        return promote(take(dy.reshape(-1, dy.shape[-1]), index)).unsqueeze(1)

    def row_sizes(self, dy: Tensor) -> Tensor:
        return row_sizes(dy)

    def projected(self, x: Tensor, u: Tensor) -> Tensor:
        weight = u[0, :-1] if self.biased else u[0]
        product = promote(x).reshape(-1, x.shape[-1]) @ weight
        return product + u[0, -1] if self.biased else product

    def projected_output(self, dy: Tensor, v: Tensor) -> Tensor:
        return promote(dy).reshape(-1, dy.shape[-1]) @ v[0]

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        weight, bias = split_pair(tensors)
        return pack_columns((weight.T if self.transposed else weight).unsqueeze(0), bias)

    def unpack(self, matrix: Tensor) -> tuple[Tensor, ...]:
        weight = matrix[0, :, :-1] if self.biased else matrix[0]
        weight = weight.T if self.transposed else weight
        return (weight, matrix[0, :, -1]) if self.biased else (weight,)


class LinearPart(Linear):
    """A call with a part of a linear layer's weight: inputs and outputs of the rest are zero, as is a missing bias."""

    def __init__(self, whole: Any, chosen: Matrix, bias: bool):
        for name, value in vars(whole).items():
            setattr(self, name, value)
        rows, columns = (chosen.columns, chosen.rows) if whole.transposed else chosen[:2]
        self.outputs, self.inputs, self.adds = rows, columns, bias
        self.width = rows.stop - rows.start

    def rows(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        rows = promote(take(x.reshape(-1, x.shape[-1]), index))
        width = self.shape.inner - self.biased
        rows = pad(rows, (self.inputs.start, width - self.inputs.stop))
        if self.biased:
            rows = torch.cat([rows, rows.new_full((len(rows), 1), float(self.adds))], 1)
        return rows.unsqueeze(1)

    def output_rows(self, dy: Tensor, index: Tensor | None = None) -> Tensor:
        rows = super().output_rows(dy, index)
        return pad(rows, (self.outputs.start, self.shape.out - self.outputs.stop))

    def projected(self, x: Tensor, u: Tensor) -> Tensor:
        product = promote(x).reshape(-1, x.shape[-1]) @ u[0, self.inputs]
        return product + u[0, -1] if self.adds else product

    def projected_output(self, dy: Tensor, v: Tensor) -> Tensor:
        return promote(dy).reshape(-1, dy.shape[-1]) @ v[0, self.outputs]


class ScaledBias(Linear):
    """A bias that is added by itself, times constants [o] or []: zeros where it is left out."""

    def __init__(self, whole: Any, times: Tensor):
        for name, value in vars(whole).items():
            setattr(self, name, value)
        self.times = times

    def output_rows(self, dy: Tensor, index: Tensor | None = None) -> Tensor:
        return super().output_rows(dy, index) * self.times

    def row_sizes(self, dy: Tensor) -> Tensor:
        return row_sizes(dy * self.times)

    def projected_output(self, dy: Tensor, v: Tensor) -> Tensor:
        return super().projected_output(dy, v * self.times)


class Exchanged(LinearPart):
    """A call of a linear layer, or of an embedding, with the transpose of its weight: inputs and outputs change sides.

    The gradient of the weight is the sum over rows of x dy^T where others have dy x^T, so dy is the row a and x the
    row g. The two sides scale with the loss in other ways (a not at all, g as the loss). So dy is divided by the root
    of its mean square norm and x multiplied by it: their products are the same, and the rows a of a call have a mean
    square norm of 1, as the one-hot rows of an embedding have. Rows without gradient are zero on both sides.
    """

    def __init__(self, whole: Any, chosen: Matrix):
        super().__init__(whole, chosen, False)

    def exchanged(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return exchange(x, dy)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        raise TypeError("the form of one call holds no weights")


class Lookup(LinearPart):
    """A call that looks columns of the weight up: its inputs are one-hot."""

    free = 0

    def __init__(self, whole: Any, chosen: Matrix, padding: int | None):
        super().__init__(whole, chosen, False)
        self.padding = padding

    def count(self, x: Tensor) -> tuple[int, int]:
        samples = x.shape[0] if x.dim() else 1
        return samples, x.numel() // max(1, samples)

    def rows(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        chosen = take(x.reshape(-1), index)
        rows = torch.nn.functional.one_hot(chosen + self.inputs.start, self.shape.inner)
        rows = rows.to(promote(self.parameters[0]).dtype).unsqueeze(1)
        return rows if self.padding is None else rows * (chosen != self.padding).view(-1, 1, 1)

    def projected(self, x: Tensor, u: Tensor) -> Tensor:
        products = u[0, self.inputs][x.reshape(-1)]
        return products if self.padding is None else products.masked_fill(x.reshape(-1) == self.padding, 0)


def exchange(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The rows a and g of a call on x whose output has the gradient dy, where the two change sides (see Exchanged)."""
    a, g = promote(dy), promote(x)
    live = counted(row_sizes(dy)).view(*a.shape[:-1], 1).to(a.dtype)
    mean = a.square().sum() / live.sum().clamp_min(1)
    root = torch.where(mean > 0, mean, 1).sqrt()
    return a / root, g * (root * live)


@layer_of.register
def _(module: nn.Linear) -> Linear | str:
    return Linear(module)
