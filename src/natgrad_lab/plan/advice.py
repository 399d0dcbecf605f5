"""Which settings keep second-order work below a share of SGD's step, as a line to paste behind `natgrad train`.

What accuracy may depend on is changed last: first gradients overlap the backward pass, then statistics and weights
travel in half precision, then fewer rows are measured, and in all cases the shortest interval that fits is taken.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import fields, replace
from typing import Any

from natgrad_lab.plan.scaling import Planner
from natgrad_lab.train.optimizers import KFac, Nlcg, Seng, Settings, Sgd, SpNgd

CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"overlap": True},
    {"wire": "bfloat16"},
    {"wire": "bfloat16", "overlap": True},
    {"rows_per_dim": 8},
    {"rows_per_dim": 8, "overlap": True},
    {"rows_per_dim": 8, "wire": "bfloat16", "overlap": True},
    {"rows_per_dim": 8, "wire": "bfloat16", "weights_wire": "bfloat16", "overlap": True},
    {"rows_per_dim": 4, "wire": "bfloat16", "weights_wire": "bfloat16", "overlap": True},
)
OF_ROWS: tuple[dict[str, Any], ...] = (
    {},
    {"overlap": True},
    {"replicated": True},
    {"wire": "bfloat16", "overlap": True},
    {"samples": 64, "wire": "bfloat16", "overlap": True},
)
ROWS = frozenset({"rows_per_dim", "samples"})
"""Fields that say how much of a batch is measured: rows for each dimension, and SENG's columns."""
GOOD = 20
"""An interval that is short enough not to look for a shorter one by changing more."""
MOST = 1000


def parsed(share: str) -> float:
    """A share such as 5% or 0.05."""
    try:
        value = float(share.removesuffix("%")) / (100 if share.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value < 10:
        raise ValueError(f"overhead={share!r} is no share of a step; give --overhead 5%")
    return value


def tried(settings: Settings, one_rank: bool) -> Iterator[Settings]:
    """The settings with each of the changes that say anything."""
    for change in OF_ROWS if isinstance(settings, Seng) else CHANGES:
        if one_rank and set(change) - ROWS:
            continue
        if any(worse(settings, name, value) for name, value in change.items()):
            continue
        yield replace(settings, **change)


def worse(settings: Settings, name: str, value: Any) -> bool:
    """Whether a change would take the wrong direction, or says nothing."""
    now = getattr(settings, name)
    if name in ROWS:
        return now is not None and now <= value
    return name == "weights_wire" and getattr(settings, "replicated", False)


def interval(planner: Planner, settings: Settings, ranks: int, batch: int, allowed: float) -> int | None:
    """The shortest interval whose average step is at most `allowed` seconds; None: none is long enough."""
    account = planner.account(every(settings, 1), ranks, batch)
    stale, fresh = (sum(account.stages(kind)[0].values()) for kind in (False, True))
    if stale >= allowed:
        return None
    return min(MOST, max(1, math.ceil((fresh - stale) / (allowed - stale))))


def every(settings: Settings, steps: int) -> Settings:
    """The settings with a fixed interval, the numbers of the adaptive rule and the budget back at their defaults."""
    known = {entry.name: entry.default for entry in fields(settings)}
    names = ("tolerance", "widen_below", "limit", "refresh_share")
    rule = {name: known[name] for name in names if name in known}
    change: dict[str, Any] = {"refresh": steps, **rule}
    return replace(settings, **change)


def advise(planner: Planner, settings: Settings, ranks: int, batch: int, overhead: float) -> dict[str, Any]:
    """What to paste, and what it comes to."""
    curved = isinstance(settings, (SpNgd, KFac, Seng)) or (
        isinstance(settings, Nlcg) and settings.preconditioner == "kronecker"
    )
    if not curved:
        name = type(settings).__name__
        raise ValueError(
            f"overhead={overhead:.0%}: {name} measures no curvature; name a recipe of SP-NGD, K-FAC or SENG"
        )
    base = sum(planner.account(Sgd(), ranks, batch).stages(False)[0].values())
    best: tuple[int, Settings] | None = None
    for candidate in tried(settings, ranks == 1):
        try:
            found = interval(planner, candidate, ranks, batch, base * (1 + overhead))
        except ValueError:  # settings that do not work on a model that is cut over ranks
            continue
        if found is not None and (best is None or found < best[0]):
            best = found, candidate
        if best is not None and best[0] <= GOOD:
            break
    if best is None:
        stale = sum(planner.account(settings, ranks, batch).stages(False)[0].values())
        said = f"with nothing measured a step takes {stale / base - 1:.1%} more than SGD's: take fewer ranks"
        return {"ranks": ranks, "overhead": overhead, "line": None, "why": f"{said} or a larger batch"}
    steps, chosen = best[0], every(best[1], best[0])
    account = planner.account(chosen, ranks, batch)
    stale, fresh = (sum(account.stages(kind)[0].values()) for kind in (False, True))
    more = (stale + (fresh - stale) / steps) / base - 1
    return {
        "ranks": ranks,
        "overhead": overhead,
        "line": line(settings, chosen),
        "why": f"{more:.1%} more than SGD's step on {ranks:,} ranks, {fresh / base - 1:.0%} in a step that measures",
    }


def line(before: Settings, after: Settings, always: Collection[str] = frozenset({"refresh"}) | ROWS) -> str:
    """The fields that differ, as the command line takes them; those named `always` in any case."""
    words = []
    for entry in fields(after):
        value = getattr(after, entry.name)
        if value != getattr(before, entry.name) or entry.name in always:
            flag = "--optimizer." + entry.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(flag if value else flag.replace("optimizer.", "optimizer.no-"))
            else:
                words.append(f"{flag} {value}")
    return " ".join(words)
