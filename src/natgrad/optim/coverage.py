"""Which parameters have which curvature, why, and what it costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from natgrad.curvature import Cost
from natgrad.layer_state import LayerState
from natgrad.layers.uncurved import UncurvedParameter

REFERENCE_ROWS = 4096  # rows of a refresh for the cost column


@dataclass(frozen=True)
class Coverage:
    """One layer: `bytes` is what its owner holds for it besides the weight, `flops` one refresh and one step."""

    layer: str
    kind: str
    curvature: str
    why: str
    shape: str
    parameters: int
    bytes: int
    flops: float
    owner: int
    covered: bool = True  # by a curvature of its own


class CoverageTable(list):
    """Rows of Coverage; printed, a table."""

    @property
    def share(self) -> float:
        """The share of the weights that have a curvature of their own."""
        total = sum(row.parameters for row in self)
        return sum(row.parameters for row in self if row.covered) / max(total, 1)

    def reasons(self, most: int = 3) -> str:
        """Why weights have none: the reasons of the most weights, with their shares."""
        total, by = max(sum(row.parameters for row in self), 1), Counter()
        for row in self:
            if not row.covered:
                by[row.why] += row.parameters
        return "; ".join(f"{why} ({count / total:.0%})" for why, count in by.most_common(most))

    def __str__(self) -> str:
        head = ("layer", "curvature", "weights", "bytes", "owner", "why")
        cells = [
            (
                row.layer or "(the model)",
                row.curvature,
                f"{row.parameters:,}",
                f"{row.bytes:,}",
                str(row.owner),
                row.why,
            )
            for row in self
        ]
        widths = [max(len(row[k]) for row in (head, *cells)) for k in range(len(head))]
        right = {2, 3, 4}
        lines = [
            "  ".join(v.rjust(w) if k in right else v.ljust(w) for k, (v, w) in enumerate(zip(row, widths))).rstrip()
            for row in (head, *cells)
        ]
        return "\n".join([*lines, f"{self.share:.1%} of the weights have a curvature of their own"])


class Preconditioned(NamedTuple):
    """How many layers and weights a step preconditioned by their own curvature, of all that it moved."""

    layers: int
    weights: int
    of_layers: int
    of_weights: int

    @property
    def share(self) -> float:
        """Of the weights."""
        return self.weights / max(self.of_weights, 1)


def count_preconditioned(cells: Sequence[LayerState], present: Sequence[bool]) -> Preconditioned:
    """Counts over all ranks' layers that have a gradient."""
    moved = [cell for cell, here in zip(cells, present) if here]
    own = [cell for cell in moved if cell.statistics and cell.ready]
    weights = [sum(sum(p.numel() for p in cell.layer.parameters) for cell in some) for some in (own, moved)]
    return Preconditioned(len(own), weights[0], len(moved), weights[1])


def coverage(
    cells: Sequence[LayerState], whys: Sequence[str], fallback: str, vectors: int, loose_vectors: int
) -> CoverageTable:
    """A row for every layer, in the model's order.

    vectors: how many tensors of a weight's size are kept beside its curvature; loose_vectors: of loose parameters.
    """
    rows = CoverageTable()
    for cell, why in zip(cells, whys):
        loose = isinstance(cell.layer, UncurvedParameter)
        weight = cell.layer.parameters[0]
        width = max(weight.element_size(), 4)
        if loose:
            held, flops = loose_vectors * weight.numel() * width, 0.0
        else:
            cost = cell.curvature.cost(cell.layer, REFERENCE_ROWS)
            held = bytes_held(cell, cost) + vectors * cell.layer.shape.numel * width
            flops = 2 * (cost.measure + cost.work)
        rows.append(
            Coverage(
                layer=cell.name,
                kind=cell.layer.kind,
                curvature=f"none ({fallback})" if loose else describe(cell),
                why=why or "known layer",
                shape="x".join(map(str, cell.layer.shape)),
                parameters=sum(p.numel() for p in cell.layer.parameters),
                bytes=held,
                flops=flops,
                owner=cell.owner,
                covered=bool(cell.statistics),
            )
        )
    return rows


def bytes_held(cell: LayerState, cost: Cost) -> int:
    """Bytes of a layer's statistics and inverses: of rows those that were measured, before that what columns take."""
    if not cell.by_rows:
        return sum(math.prod(one.shape) * one.dtype.itemsize for one in cell.held())
    rows = [value for name, value in cell.state().items() if name in cell.row_names]
    return sum(v.numel() * v.element_size() for v in rows) or 4 * cost.numbers


def describe(cell: LayerState) -> str:
    """The curvature's name, with the sides that are kept diagonal."""
    if cell.by_rows:
        return cell.curvature.name
    sides = [m.key for m in cell.statistics if len(m.shape(cell.layer)) == 2]
    return cell.curvature.name + (f" ({', '.join(sides)} diagonal)" if sides else "")
