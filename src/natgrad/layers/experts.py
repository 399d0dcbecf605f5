"""A matrix for each expert in one tensor: blocks W[e, out, in], each of which sees the rows that are routed to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from natgrad.layers.layer import Layer, Shape, he_scale, promote, row_sizes, take
from natgrad.layers.linear import exchange
from natgrad.layers.use import Form, Part, Use

Segment = tuple[int, int, int]  # an expert, the first of its rows, the one after its last row


class Experts(Layer):
    """A parameter [experts, out, in], or [experts, in, out] where it is multiplied from the other side.

    Rows of one expert are a call of that block alone. Which sample a row is of cannot be seen, so there are no rows of
    single samples.
    """

    kind = "experts"
    per_sample = False
    uneven = True
    counts_live = True  # type: ignore[assignment]

    def __init__(self, module: Any, weight: Any):
        super().__init__(module, Shape(*weight.shape), (weight,), he_scale(weight.shape[2]))

    def form(self, use: Use) -> Form | None:
        _, out, inner = self.shape
        if use.x.dim() != 2 or use.bias is not None:
            return None
        if use.does == "grouped":
            turned = _turned(use.part, tuple(self.shape))
            ends = use.options.get("ends")
            if turned is None or ends is None:
                return None
            stops = ends.tolist()
            return self._call([(k, a, b) for k, (a, b) in enumerate(zip([0, *stops], stops))], turned, use.x)
        chosen = use.part.matrix(inner) if use.does == "linear" else None
        if chosen is None or chosen.rows.start % out or chosen.rows.stop - chosen.rows.start != out:
            return None
        if chosen.columns != slice(0, inner):
            return None
        return self._call([(chosen.rows.start // out, 0, len(use.x))], chosen.turned, use.x)

    def _call(self, segments: list[Segment], turned: bool, x: Tensor) -> Form:
        return Form(ExpertsCall(self, segments), x, late=turned)

    def count(self, x: Tensor) -> tuple[int, int]:
        return len(x), 1

    def rows(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        raise TypeError("which expert a row is of is known by the calls alone")

    def output_rows(self, dy: Tensor, index: Tensor | None = None) -> Tensor:
        raise TypeError("which expert a row is of is known by the calls alone")

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0]

    def unpack(self, matrix: Tensor) -> tuple[Tensor, ...]:
        return (matrix,)


class ExpertsCall(Experts):
    """One call: rows in segments, each of one expert; rows that are in none are zero."""

    def __init__(self, whole: Experts, segments: list[Segment]):
        for name, value in vars(whole).items():
            setattr(self, name, value)
        self.segments = segments

    def exchanged(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return exchange(x, dy)

    def _spread(self, x: Tensor, index: Tensor | None) -> Tensor:
        """Rows [m, d] as [m, e, d], zero but in their own blocks."""
        x, where = promote(x), self._owners(x)
        if index is not None:
            x, where = take(x, index), where[index]
        rows = x.new_zeros(len(x), self.shape.blocks + 1, x.shape[1])
        rows[torch.arange(len(x), device=x.device), where] = x
        return rows[:, :-1]

    def _owners(self, x: Tensor) -> Tensor:
        """The expert of each row, or their number where a row has none."""
        where = torch.full((len(x),), self.shape.blocks, device=x.device)
        for expert, start, stop in self.segments:
            where[start:stop] = expert
        return where

    def rows(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        return self._spread(x, index)

    def output_rows(self, dy: Tensor, index: Tensor | None = None) -> Tensor:
        return self._spread(dy, index)

    def row_sizes(self, dy: Tensor) -> Tensor:
        return row_sizes(dy)

    def live_rows(self, live: Tensor) -> Tensor:
        found = torch.zeros(self.shape.blocks, dtype=torch.float64, device=live.device)
        for expert, start, stop in self.segments:
            found[expert] += live[start:stop].sum()
        return found

    def live_total(self, x: Tensor, live: Tensor) -> Tensor:
        return self._moment(promote(x) * live.unsqueeze(1))

    def live_squares(self, x: Tensor, live: Tensor) -> Tensor:
        return self.mean_square(promote(x) * live.unsqueeze(1)).mul_(max(1, len(x)))

    def _moment(self, x: Tensor) -> Tensor:
        x = promote(x)
        total = x.new_zeros(self.shape.blocks, x.shape[1], x.shape[1])
        for expert, start, stop in self.segments:
            total[expert] += x[start:stop].T @ x[start:stop]
        return total

    def second_moment(self, x: Tensor) -> Tensor:
        return self._moment(x).div_(max(1, len(x)))

    def second_moment_cost(self, x: Tensor) -> float:
        return 0.0  # a sample of rows would be written out for all experts

    def mean_square(self, x: Tensor) -> Tensor:
        x = promote(x)
        total = x.new_zeros(self.shape.blocks, x.shape[1])
        for expert, start, stop in self.segments:
            total[expert] += x[start:stop].square().sum(0)
        return total.div_(max(1, len(x)))

    def output_moment(self, dy: Tensor) -> Tensor:
        return self._moment(dy)

    def projected(self, x: Tensor, u: Tensor) -> Tensor:
        found = promote(x).new_zeros(len(x))
        for expert, start, stop in self.segments:
            found[start:stop] = promote(x[start:stop]) @ u[expert]
        return found

    def projected_output(self, dy: Tensor, v: Tensor) -> Tensor:
        return self.projected(dy, v)


def _turned(part: Part, shape: tuple[int, ...]) -> bool | None:
    """Whether all matrices of a tensor are given as they are (False) or transposed (True); None: neither."""
    experts, out, inner = shape
    if part.offset or len(part.size) != 3:
        return None
    if tuple(part.size) == shape and part.stride == (out * inner, inner, 1):
        return False
    return True if tuple(part.size) == (experts, inner, out) and part.stride == (out * inner, 1, inner) else None
