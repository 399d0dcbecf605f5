"""How a function of torch uses a weight: what it was given, what it makes of the weight, and which part of it that is.

A weight is known by itself. A function is given the parameter, a view of it (a transpose, a slice, one expert), or the
same numbers in another type; a `Part` says which entries those are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Part(NamedTuple):
    """Entries of a parameter, as its strided view: `place` is the parameter's place among those of its layer.

    through: the least precise type in which its numbers have been since. times: constants by which they were multiplied
    since, one for each entry [numel] or one for all.
    """

    parameter: nn.Parameter
    place: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    through: torch.dtype | None = None
    times: Tensor | float = 1.0

    @property
    def plain(self) -> bool:
        """Whether its numbers are the parameter's."""
        return isinstance(self.times, float) and self.times == 1

    @property
    def full(self) -> bool:
        """Whether it is the whole parameter in its own order (dimensions of one may have come or gone)."""
        own = [(n, s) for n, s in zip(self.size, self.stride) if n != 1]
        whole = [(n, s) for n, s in zip(self.parameter.shape, contiguous(self.parameter.shape)) if n != 1]
        return self.offset == 0 and own == whole

    def matrix(self, columns: int) -> Matrix | None:
        """The part as rows and columns of the parameter's last two dimensions, of which the last has `columns`."""
        if len(self.size) != 2:
            return None
        (n, m), (down, right) = self.size, self.stride
        row, column = divmod(self.offset, columns)
        if (n == 1 or down == columns) and (m == 1 or right == 1) and column + m <= columns:
            return Matrix(slice(row, row + n), slice(column, column + m), False)
        if (n == 1 or down == 1) and (m == 1 or right == columns) and column + n <= columns:
            return Matrix(slice(row, row + m), slice(column, column + n), True)
        return None


class Matrix(NamedTuple):
    """Rows and columns of a matrix; `turned`: transposed."""

    rows: slice
    columns: slice
    turned: bool


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))


@dataclass(frozen=True)
class Use:
    """One call of a function on a weight.

    does: what the function computes.
        linear          y = x w^T (+ bias), the last dimension of x contracted; w [out, in]
        left            y = w x, the last dimension but one of x contracted
        conv, conv_transpose
        embedding       rows of w, chosen by the whole numbers x
        batch_norm, layer_norm, group_norm, instance_norm, rms_norm
        scale           y = w x, entry by entry; x is of the shape of y
        shift           y = x + w, w a number for each of the entries of some dimensions of y
        grouped         y = x w[k] for rows of x that `ends` divides among the matrices of w
    part: of the weight, in the form in which the function was given it.
    bias: the bias of the same layer, or the part of it that the function adds.
    options: the function's other arguments, by their names in torch.nn.functional.
    """

    does: str
    x: Tensor
    part: Part
    bias: Part | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class Form(NamedTuple):
    """A layer as one call uses it, and the input in the form in which that layer reads it.

    late: input and output have changed sides, so that both are known only after the backward pass: `layer.exchanged`.
    turned: features are in the last dimension but one of what the function gives.
    """

    layer: Any
    x: Tensor
    late: bool = False
    turned: bool = False
