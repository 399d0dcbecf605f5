"""Layers that were watched but never called: those not in use wait, those used behind our back become loose."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from natgrad.cell import DORMANT, Cell
from natgrad.curvature import Identity
from natgrad.layers import Found, Loose
from natgrad.optim.checks import NatgradWarning

if TYPE_CHECKING:
    from natgrad.optim.base import SecondOrder

WHY = "its module is never called, though its weight gets a gradient"


def look_after(optimizer: SecondOrder, unseen: set[int], present: Sequence[bool], step: int) -> None:
    """Decide about the layers that `refresh` did not see in this step, and wake those that came into use."""
    engine = optimizer.engine
    never = [k for k in sorted(unseen) if present[k] and not engine.cells[k].ready]
    for k in unseen:
        if not present[k]:
            engine.sleep(k)
        elif engine.cells[k].ready:
            engine.wait(k, step)
    for k, cell in enumerate(engine.cells):
        if present[k] and k not in unseen and any(cell.clock(m.key)[0] >= DORMANT for m in cell.curvature.statistics):
            engine.wake(k, step + 1)
    if never:
        loosen(optimizer, never)


def loosen(optimizer: SecondOrder, indices: Sequence[int]) -> None:
    """Turn cells into loose parameters, each with the fallback's state at the same owner."""
    names = [optimizer.cells[k].name for k in indices]
    message = f"{', '.join(names)}: {WHY}, so it trains without curvature ({optimizer.fallback.name})"
    if optimizer.strict:
        raise ValueError(f"strict=True, but {message}")
    warnings.warn(message, NatgradWarning, stacklevel=4)
    cells: list[Cell] = []
    whys: list[str] = []
    for k, (cell, why) in enumerate(zip(optimizer.cells, optimizer.whys)):
        if k not in indices:
            cells.append(cell)
            whys.append(why)
            continue
        for parameter in cell.layer.parameters:
            key = next(n for n, p in cell.layer.module.named_parameters() if p is parameter)
            found = Found(f"{cell.name}.{key}".lstrip("."), Loose(cell.layer.module, parameter), WHY)
            loose = optimizer.make_cell(found, Identity(), cell.owner, {})
            step = optimizer.state[parameter]["step"]
            optimizer.state[parameter] = optimizer.fresh_state(loose, optimizer.world.rank)[parameter]
            optimizer.state[parameter]["step"] = step
            cells.append(loose)
            whys.append(WHY)
    optimizer.whys = whys
    optimizer.engine.replace(cells)
