"""Which parameters have which curvature, why, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from natgrad.cell import Cell
from natgrad.curvature import Cost
from natgrad.layers.loose import Loose

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


def coverage(cells: Sequence[Cell], whys: Sequence[str], fallback: str, vectors: int) -> list[Coverage]:
    """A row for every layer, in the model's order. `vectors`: what is kept beside curvature, as often as weights."""
    rows = []
    for cell, why in zip(cells, whys):
        loose = isinstance(cell.layer, Loose)
        weight = cell.layer.parameters[0]
        if loose:
            numbers, flops = 2 * weight.numel(), 0.0
        else:
            cost = cell.curvature.cost(cell.layer, REFERENCE_ROWS)
            numbers = held(cell, cost) + vectors * cell.layer.shape.numel
            flops = 2 * (cost.measure + cost.work)
        rows.append(
            Coverage(
                layer=cell.name,
                kind=cell.layer.kind,
                curvature=f"none ({fallback})" if loose else describe(cell),
                why=why or "known layer",
                shape="x".join(map(str, cell.layer.shape)),
                parameters=sum(p.numel() for p in cell.layer.parameters),
                bytes=numbers * max(weight.element_size(), 4),
                flops=flops,
                owner=cell.owner,
            )
        )
    return rows


def held(cell: Cell, cost: Cost) -> int:
    """How many numbers the statistics are: of rows as many as were measured, before that what columns would be."""
    if not cell.by_rows:
        return (3 if cell.staleness().looks_back > 1 else 2) * cost.numbers
    rows = [value for name, value in cell.state().items() if name in cell.row_names]
    return sum(v.numel() * v.element_size() for v in rows) // 4 or cost.numbers


def describe(cell: Cell) -> str:
    """The curvature's name, with the sides that are kept diagonal."""
    if cell.by_rows:
        return cell.curvature.name
    sides = [m.key for m in cell.curvature.statistics if len(m.shape(cell.layer)) == 2]
    return cell.curvature.name + (f" ({', '.join(sides)} diagonal)" if sides else "")
