"""Fully connected layers: the last dimension is the input, the first the samples, all between are shared places."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from natgrad.layers.layer import (
    Layer,
    Shape,
    he_scale,
    layer_of,
    pack_columns,
    promote,
    split_pair,
    take,
    weight_and_bias,
    with_ones,
)


class Linear(Layer):
    """nn.Linear: one block W[1, out, in (+1)] (SP-NGD section 3.3.1; the bias in homogeneous coordinates)."""

    kind = "linear"
    free = 1

    def __init__(self, module: nn.Linear):
        self.biased = module.bias is not None
        shape = Shape(1, module.out_features, module.in_features + self.biased)
        super().__init__(module, shape, weight_and_bias(module), he_scale(module.in_features))

    def count(self, x: Tensor) -> tuple[int, int]:
        samples = x.shape[0] if x.dim() > 1 else 1
        return samples, x.numel() // (samples * x.shape[-1]) if x.numel() else 0

    def rows(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        return with_ones(promote(take(x.reshape(-1, x.shape[-1]), index)).unsqueeze(1), self.biased)

    def output_rows(self, dy: Tensor, index: Tensor | None = None) -> Tensor:
        return promote(take(dy.reshape(-1, dy.shape[-1]), index)).unsqueeze(1)

    def projected(self, x: Tensor, u: Tensor) -> Tensor:
        weight = u[0, :-1] if self.biased else u[0]
        product = promote(x).reshape(-1, x.shape[-1]) @ weight
        return product + u[0, -1] if self.biased else product

    def projected_output(self, dy: Tensor, v: Tensor) -> Tensor:
        return promote(dy).reshape(-1, dy.shape[-1]) @ v[0]

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        weight, bias = split_pair(tensors)
        return pack_columns(weight.unsqueeze(0), bias)

    def unpack(self, matrix: Tensor) -> tuple[Tensor, ...]:
        if not self.biased:
            return (matrix[0],)
        return matrix[0, :, :-1], matrix[0, :, -1]


@layer_of.register
def _(module: nn.Linear) -> Linear | str:
    return Linear(module)
