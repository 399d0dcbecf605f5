"""Rows of all ranks, brought to the owners of their layers and made alike on the way.

One small maximum tells everybody the form of each layer's rows (columns or factors, and how many places), one small
sum how many rows each rank has; then every rank sends its rows to the owners. With `World(owners=False)` everybody is
an owner of everything, and rows go to all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from natgrad.capture import Key, Measured
from natgrad.cell import Cell
from natgrad.curvature.rows import Sample, conform, count, places_of, scaled
from natgrad.curvature.samplespace import SampleSpace
from natgrad.parallel import Parcel, World, bring

FORMS = ("columns", "left", "right", "tokens", "mean")


def bring_rows(
    cells: Sequence[Cell], world: World, keys: Sequence[Key], measured: Measured, weigh: float
) -> dict[Key, Sample]:
    """The rows of every layer that this rank owns, as gradients of each sample's own loss.

    weigh: times what hooks saw it is the gradient of a sample's own loss.
    """
    if not keys:
        return {}
    forms = torch.tensor([form_of(measured.rows.get(key)) for key in keys], dtype=torch.int64)
    world.max([forms], "scalars")
    usual = usual_rows(measured)
    alike = [
        _alike(cells[key[0]], measured.rows.get(key), form, weigh, usual) for key, form in zip(keys, forms.tolist())
    ]
    counts = torch.zeros(len(keys), world.size, dtype=torch.int64)
    counts[:, world.rank] = torch.tensor([len(rows["mean"]) for rows in alike])
    if not local(cells, keys):
        world.sum([counts], "scalars")
    parcels, places = [], []
    for place, ((index, _), rows) in enumerate(zip(keys, alike)):
        for name in FORMS:
            if name in rows:
                parcels.append(Parcel(rows[name], cells[index].owner))
                places.append((place, name))
    if local(cells, keys):
        received: list[Tensor | None] = [p.tensor for p in parcels]
    else:
        received = bring(world, parcels, counts[[place for place, _ in places]], "statistics")
    result: dict[Key, Sample] = {}
    for (place, name), value in zip(places, received):
        if value is not None:
            result.setdefault(keys[place], {})[name] = value
    return result


def local(cells: Sequence[Cell], keys: Sequence[Key]) -> bool:
    """Whether every rank is to use its own rows, as SENG's release does."""
    curvature = cells[keys[0][0]].curvature
    return isinstance(curvature, SampleSpace) and curvature.legacy is not None and curvature.legacy.local


def form_of(rows: Sample | None) -> list[int]:
    """(whether rows are columns, their places, whether they have tokens); the largest on any rank holds for all."""
    if rows is None:
        return [0, 0, 0]
    return [int("columns" in rows), places_of(rows), int("tokens" in rows)]


def usual_rows(measured: Measured) -> Sample:
    """Rows of as many samples as most layers of this rank have; none if it measured nothing."""
    counts = Counter(count(rows) for rows in measured.rows.values())
    return next((r for r in measured.rows.values() if count(r) == counts.most_common(1)[0][0]), {})


def _alike(cell: Cell, rows: Sample | None, form: list[int], weigh: float, usual: Sample) -> Sample:
    """Rows of one rank in the form that all have agreed on, with `mean`, what the gradient has of each.

    The samples of a rank that did not call the layer have gradients of zero, and count as such.
    """
    columns, places, tokens = form
    shape = cell.layer.shape
    if rows is None:
        n = count(usual) if usual else 0
        second = {"right": (n, places, shape.blocks, shape.inner)} if not tokens else {}
        sizes = {"columns": (n, shape.numel)} if columns else {"left": (n, places, *shape[:2]), **second}
        rows = {name: cell.zeros(size) for name, size in sizes.items()}
        if tokens and not columns:
            rows["tokens"] = torch.full((n, places), -1, device=rows["left"].device)
        rows |= {"mean": usual["mean"]} if "mean" in usual else {}
    rows = conform(rows, shape, bool(columns), places)
    if "mean" in rows:  # rows without a scale of their own
        return {**rows, "mean": rows["mean"].to(cell.zeros(()).dtype) * weigh}
    return {**scaled(rows, weigh), "mean": cell.zeros((count(rows),)) + 1}
