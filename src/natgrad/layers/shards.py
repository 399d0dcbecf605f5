"""The part of a layer's parameters that one rank holds, where parameters are cut along their first dimension.

W[b, o, i] of a layer is (outer, n, inner) numbers, where n is the first dimension of its parameters. A part is the rows
[start, stop) of n: (outer, stop - start, inner) numbers, the bias among them. Nothing is watched here: rules and
lengths work on parts, entry by entry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from natgrad.layers.layer import Layer, Shape, real
from natgrad.layers.uncurved import UncurvedParameter


class Cut:
    """How a layer's W[b, o, i] is cut where its parameters are cut along their first dimension.

    form: (outer, n, inner). shape, dim: the shape of what is kept of the layer in W's form, and the dimension along
    which that is cut. It is W's own shape, or the form where W has no such dimension (convolutions in groups).

    Raises:
        ValueError: where the parameters of the layer are cut in unlike ways.

    """

    def __init__(self, layer: Layer):
        marked = torch.empty(layer.shape, dtype=torch.float32, device="meta")
        self.views = [(tuple(v.shape), v.stride(), int(v.storage_offset())) for v in map(real, layer.unpack(marked))]
        (size, stride, _), *others = self.views
        numel = layer.shape.numel
        n = size[0] if size else 1
        inner = numel if n == 1 else stride[0]  # the stride of a single row says nothing
        alike = all(other and other[0] == n and (n == 1 or step[0] == inner) for other, step, _ in others)
        if not alike or numel % (n * inner) or any(offset >= inner for *_, offset in self.views):
            raise ValueError(
                f"fully_shard cuts the parameters of a {type(layer).__name__}, "
                f"{[tuple(p.shape) for p in layer.parameters]}, in unlike ways: leave its module out of params="
            )
        self.form = outer, _, _ = numel // (n * inner), n, inner
        self.shape, self.dim = self.form, 1
        for dim, side in enumerate(layer.shape):
            if side == n and math.prod(layer.shape[:dim]) == outer:
                self.shape, self.dim = tuple(layer.shape), dim


class LayerShard(Layer):
    """Rows [start, stop) of a layer's parameters as W[outer, rows, inner]. `parameters` are the plain parts of them."""

    def __init__(self, whole: Layer, cut: Cut, parameters: Sequence[nn.Parameter], start: int, stop: int):
        self.whole, self.cut, self.kind = whole, cut, whole.kind
        outer, n, inner = cut.form
        Layer.__init__(self, whole.module, Shape(outer, stop - start, inner), parameters, whole.scale)
        self._views = [
            (
                (stop - start, *size[1:]) if size else size,
                tuple(step // n * (stop - start) if k and step >= n * inner else step for k, step in enumerate(stride)),
                offset,
            )
            for size, stride, offset in cut.views
        ]

    @property
    def numel(self) -> int:
        return self.whole.numel

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """The part that this rank has of what is kept of the layer in the shape `cut.shape`."""
        return tuple(self.shape.out if k == self.cut.dim else side for k, side in enumerate(self.cut.shape))

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        matrix = tensors[0].new_empty(self.shape)
        for part, tensor in zip(self.unpack(matrix), tensors):
            part.copy_(real(tensor))
        return matrix

    def unpack(self, matrix: Tensor) -> tuple[Tensor, ...]:
        begin = int(matrix.storage_offset())
        return tuple(matrix.as_strided(size, stride, begin + offset) for size, stride, offset in self._views)

    def count(self, x: Tensor) -> tuple[int, int]:
        raise TypeError("a part of a layer is not watched")

    def rows(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        raise TypeError("a part of a layer is not watched")

    def output_rows(self, dy: Tensor, index: Tensor | None = None) -> Tensor:
        raise TypeError("a part of a layer is not watched")


class UncurvedShard(LayerShard, UncurvedParameter):
    """The part of a parameter that belongs to no known layer."""


def shard_of(whole: Layer, cut: Cut, parameters: Sequence[nn.Parameter], start: int, stop: int) -> LayerShard:
    """Rows [start, stop) of a layer's parameters, of which `parameters` are the plain parts."""
    kind = UncurvedShard if isinstance(whole, UncurvedParameter) else LayerShard
    return kind(whole, cut, parameters, start, stop)
