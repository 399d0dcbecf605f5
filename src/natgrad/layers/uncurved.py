"""Parameters that belong to no known layer: each trains on its own, without curvature."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from natgrad.layers.layer import Layer, Shape, real


class UncurvedParameter(Layer):
    """One parameter of any shape as W[1, first dimension, numbers of each of its rows]. Nothing is watched.

    A complex parameter is twice as many real ones.
    """

    kind = "loose"

    def __init__(self, module: nn.Module, parameter: nn.Parameter):
        numbers = real(parameter.detach())
        first = numbers.shape[0] if numbers.dim() else 1
        super().__init__(module, Shape(1, first, numbers.numel() // max(first, 1)), (parameter,), 0.02)

    def count(self, x: Tensor) -> tuple[int, int]:
        raise TypeError("a loose parameter is not watched")

    def rows(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        raise TypeError("a loose parameter is not watched")

    def output_rows(self, dy: Tensor, index: Tensor | None = None) -> Tensor:
        raise TypeError("a loose parameter is not watched")

    def pack(self, tensors) -> Tensor:
        return real(tensors[0]).reshape(self.shape)

    def unpack(self, matrix: Tensor) -> tuple[Tensor, ...]:
        (parameter,) = self.parameters
        if parameter.is_complex():
            return (torch.view_as_complex(matrix.reshape(*parameter.shape, 2)),)
        return (matrix.reshape(parameter.shape),)
