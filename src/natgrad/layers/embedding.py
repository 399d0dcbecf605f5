"""Embeddings: a linear layer of one-hot rows that are never written out."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.layers.layer import Layer, Shape, layer_of, promote, row_sizes, take
from natgrad.layers.linear import Exchanged, LinearPart
from natgrad.layers.op_cost import Passes, moved
from natgrad.layers.use import Form, Use


class Embedding(Layer):
    """nn.Embedding: W^T, a linear layer of one-hot rows, so A is the diagonal of how often each index occurs.

    weight: the module's, unless given: a table of its own.

    Where the weight is that of a linear layer too (a tied head), its calls are calls of this one, with rows that are
    not one-hot: only the diagonal of their second moment counts.
    """

    kind = "embedding"
    diagonal_inputs = True
    free = 0

    def __init__(self, module: nn.Module, weight: nn.Parameter | None = None):
        own: Any = module
        self.padding = own.padding_idx if weight is None else None
        table: nn.Parameter = own.weight if weight is None else weight
        self.biased, self.transposed = False, True  # as a linear layer
        super().__init__(module, Shape(1, *reversed(table.shape)), (table,), 0.02)  # as transformers begin

    def form(self, use: Use) -> Form | None:
        if use.does == "embedding" and use.part.full:
            padding = use.options.get("padding_idx")
            if padding == self.padding:
                return Form(self, use.x)
            other = copy.copy(self)
            other.padding = padding
            return Form(other, use.x)
        if use.does == "shift":
            return self._added(use)
        chosen = use.part.matrix(self.shape.out) if use.does in ("linear", "left") else None
        if chosen is None or use.bias:
            return None
        turned = use.does == "left"
        x = use.x.transpose(-1, -2) if turned else use.x
        if chosen.turned:
            return Form(LinearPart(self, chosen, False), x, turned=turned)
        return Form(Exchanged(self, chosen), x, late=True, turned=turned)

    def _added(self, use: Use) -> Form | None:
        """Rows of the weight are added to the places of every sample: a lookup of these rows for each of them."""
        size = [n for n in use.part.size if n != 1]
        chosen = use.part._replace(size=tuple(size), stride=(self.shape.out, 1)).matrix(self.shape.out)
        shape = use.x.shape
        if chosen is None or len(shape) != 3 or list(shape[1:]) != size or use.part.size[-2:] != shape[1:]:
            return None
        places = torch.arange(chosen.rows.start, chosen.rows.stop, device=use.x.device)
        return Form(copy.copy(self), places.expand(shape[0], -1))

    def count(self, x: Tensor) -> tuple[int, int]:
        samples = x.shape[0] if x.dim() else 1
        return samples, x.numel() // max(samples, 1)

    def rows(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        chosen = take(x.reshape(-1), index)
        rows = torch.nn.functional.one_hot(chosen, self.shape.inner).to(promote(self.parameters[0]).dtype)
        if self.padding is not None:
            rows[:, self.padding] = 0  # the padding row gets no gradient, so it is no input either
        return rows.unsqueeze(1)

    def tokens(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1)
        return tokens if self.padding is None else torch.where(tokens == self.padding, -1, tokens)

    def mean_square(self, x: Tensor) -> Tensor:
        counts = torch.bincount(x.reshape(-1), minlength=self.shape.inner)
        share = counts.to(promote(self.parameters[0]).dtype) / max(x.numel(), 1)
        if self.padding is not None:
            share[self.padding] = 0
        return share.unsqueeze(0)

    def row_sizes(self, dy: Tensor) -> Tensor:
        return row_sizes(dy)

    def live_squares(self, x: Tensor, live: Tensor) -> Tensor:
        dtype = promote(self.parameters[0]).dtype
        total = torch.zeros(self.shape.inner, dtype=dtype, device=live.device).index_add_(
            0, x.reshape(-1), live.to(dtype)
        )
        if self.padding is not None:
            total[self.padding] = 0
        return total.unsqueeze(0)

    def passes(self, x: Tensor, y: Tensor) -> Passes:
        """A row is read and written for each token; backward, rows are added up in a zeroed table."""
        back = moved(y.numel(), 2, "scatter"), moved(self.shape.numel, 1)
        return Passes((moved(y.numel(), 2, "gather"),), (), back)

    def output_rows(self, dy: Tensor, index: Tensor | None = None) -> Tensor:
        return promote(take(dy.reshape(-1, dy.shape[-1]), index)).unsqueeze(1)

    def projected(self, x: Tensor, u: Tensor) -> Tensor:
        products = u[0][x.reshape(-1)]
        return products if self.padding is None else products.masked_fill(x.reshape(-1) == self.padding, 0)

    def projected_output(self, dy: Tensor, v: Tensor) -> Tensor:
        return promote(dy).reshape(-1, dy.shape[-1]) @ v[0]

    def pack(self, tensors) -> Tensor:
        return tensors[0].T.unsqueeze(0)

    def unpack(self, matrix: Tensor) -> tuple[Tensor, ...]:
        return (matrix[0].T,)


@layer_of.register
def _(module: nn.Embedding) -> Embedding | str:
    if module.sparse:
        return "its gradient is sparse (build it with sparse=False)"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq changes the gradient"
    return Embedding(module)
