"""Rows of all ranks, brought to the owners of their layers and made alike on the way.

One small maximum tells everybody the form of each layer's rows (columns or factors, and how many places), one small
sum how many rows each rank has; then every rank sends its rows to the owners. With `World(owners=False)` everybody is
an owner of everything, and rows go to all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from natgrad.capture import Key, Measured
from natgrad.curvature.per_sample import Sample, conform, count, places_of, scaled
from natgrad.layer_state import LayerState
from natgrad.parallel import OwnedTensor, World, bring

FORMS = ("columns", "left", "right", "tokens", "mean")


def bring_rows(
    cells: Sequence[LayerState],
    world: World,
    keys: Sequence[Key],
    measured: Measured,
    weigh: float,
    wider: float,
    local: bool,
) -> dict[Key, Sample]:
    """The rows of every layer that this rank owns, as gradients of each sample's own loss.

    weigh: times what hooks saw it is the gradient of a sample's own loss.
    wider: by so much longer are rows than these gradients, so that their squares add up to the curvature.
    local: every rank uses its own rows, and nothing is sent.
    """
    if not keys:
        return {}
    forms = torch.tensor([form_of(measured.rows.get(key)) for key in keys], dtype=torch.int64)
    world.max([forms], "scalars")
    usual = usual_rows(measured)
    alike = [
        _alike(cells[key[0]], measured.rows.get(key), form, weigh, wider, usual)
        for key, form in zip(keys, forms.tolist())
    ]
    if local or world.size == 1:
        return dict(zip(keys, alike))
    counts = torch.zeros(len(keys), world.size, dtype=torch.int64)
    counts[:, world.rank] = torch.tensor([len(rows["mean"]) for rows in alike])
    world.sum([counts], "scalars")
    sent = [(place, *item) for place, rows in enumerate(alike) for item in narrowed(rows, world.wire).items()]
    parcels = [OwnedTensor(value, cells[keys[place][0]].owner) for place, _, value in sent]
    received = bring(world, parcels, counts[[place for place, *_ in sent]], "statistics")
    result: dict[Key, Sample] = {}
    for (place, name, _), value in zip(sent, received):
        if value is not None:
            result.setdefault(keys[place], {})[name] = value
    return {key: widened(rows) for key, rows in result.items()}


def narrowed(rows: Sample, wire: torch.dtype | None) -> Sample:
    """Rows as they are sent: in half precision, if asked for, each sample's over its largest entry, kept beside."""
    sent = {name: rows[name] for name in FORMS if name in rows}
    for name in ("columns", "left", "right") if wire is not None else ():
        if name in sent:
            size = sent[name].flatten(1).abs().amax(1) if sent[name].numel() else sent[name].new_zeros(len(sent[name]))
            size = torch.where(size > 0, size, 1)
            sent[name] = (sent[name] / size.view(-1, *[1] * (sent[name].dim() - 1))).to(wire)
            sent[f"{name}_size"] = size
    return sent


def widened(rows: Sample) -> Sample:
    """The inverse of `narrowed`, but for rounding."""
    for name in ("columns", "left", "right"):
        size = rows.pop(f"{name}_size", None)
        if size is not None:
            rows[name] = rows[name].to(size) * size.view(-1, *[1] * (rows[name].dim() - 1))
    return rows


def form_of(rows: Sample | None) -> list[int]:
    """(1: factors, 2: columns; their places; 1: without, 2: with tokens); the largest on any rank holds for all."""
    if rows is None:
        return [0, 0, 0]
    return [1 + ("columns" in rows), places_of(rows), 1 + ("tokens" in rows)]


def usual_rows(measured: Measured) -> Sample:
    """Rows of as many samples as most layers of this rank have; none if it measured nothing."""
    counts = Counter(count(rows) for rows in measured.rows.values())
    return next((r for r in measured.rows.values() if count(r) == counts.most_common(1)[0][0]), {})


def _alike(cell: LayerState, rows: Sample | None, form: list[int], weigh: float, wider: float, usual: Sample) -> Sample:
    """Rows of one rank in the form that all have agreed on, with `mean`, what the gradient has of each.

    The samples of a rank that did not call the layer have gradients of zero, and count as such.
    """
    columns, places, tokens = form[0] > 1, form[1], form[2] > 1
    shape = cell.layer.shape
    if rows is None:
        n = count(usual) if usual else 0
        second = {"right": (n, places, shape.blocks, shape.inner)} if not tokens else {}
        sizes = {"columns": (n, shape.numel)} if columns else {"left": (n, places, *shape[:2]), **second}
        rows = {name: cell.zeros(size) for name, size in sizes.items()}
        if tokens and not columns:
            rows["tokens"] = torch.full((n, places), -1, device=rows["left"].device)
        rows |= {"mean": usual["mean"]} if "mean" in usual else {}
    rows = conform(rows, shape, columns, places)
    if "mean" in rows:  # rows without a scale of their own
        return {**rows, "mean": rows["mean"].to(cell.zeros(()).dtype) * weigh}
    if "columns" in rows:
        rows["columns"].mul_(weigh * wider)  # they are products of this measurement; factors may be parts of gradients
    else:
        rows = scaled(rows, weigh * wider)
    return {**rows, "mean": cell.zeros((count(rows),)) + 1 / wider}
