"""Where a run goes on, agreed on by all ranks; and that all ranks mean the same run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from natgrad.parallel import World
from natgrad.train import checkpoint, machine
from natgrad.train.recipe import Recipe, described
from natgrad.train.state import without_free

FOLDER = "checkpoints"


def restarted() -> bool:
    """Say whether a launcher has started this rank again after one has failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def check_agreement(recipe: Recipe, world: World) -> None:
    """Refuse a world whose ranks have been given different recipes, or run different versions."""
    told = without_free(described(recipe))
    told |= {f"the version of {name}": machine.installed(name) for name in ("natgrad", "torch")}
    marks = [int(hashlib.sha256(json.dumps(told[name]).encode()).hexdigest()[:12], 16) for name in told]
    highest = torch.tensor([*marks, *(-mark for mark in marks)], dtype=torch.float64)
    world.max([highest])
    high, low = highest.tolist()[: len(marks)], highest.tolist()[len(marks) :]
    differing = [name for name, most, least in zip(told, high, low) if most != -least]
    if differing:
        raise ValueError(f"ranks disagree on {', '.join(differing)}; start all of them with the same command")


def choose(folder: Path, asked: int | None, world: World, fall_back: Callable[[str], None] | None) -> Path | None:
    """Return the checkpoint to go on from, none where there is none; every rank checks a share of its files.

    asked: the steps of a checkpoint, None: the last. fall_back: called with what is wrong with a damaged one, to take
    the one before it; None: refuse it by name, and name the one before.
    """
    steps = checkpoint.found(folder)
    if asked is not None:
        if asked not in steps:
            raise ValueError(f"there is no checkpoint of step {asked} in {str(folder)!r}; {_there(steps)}")
        steps = [step for step in steps if step <= asked]
    while True:
        newest = torch.tensor([float(steps[-1]) if steps and world.rank == 0 else -1.0])
        world.max([newest])  # rank 0 decides: others may see a shared folder later
        step = int(newest.item())
        if step < 0:
            return None
        path, steps = folder / checkpoint.name_of(step), [one for one in steps if one < step]
        wrong = find_damage(path, world)
        if wrong is None:
            return path
        if fall_back is None:
            raise checkpoint.DamagedError(f"{wrong}; {_before(steps)}")
        fall_back(wrong)


def find_damage(path: Path, world: World) -> str | None:
    """Return what is wrong with a checkpoint, the same on every rank."""
    bad = torch.tensor([float(_damage(path, world.rank, world.size) is not None)])
    world.max([bad])
    return (_damage(path, 0, 1) or f"a rank cannot read checkpoint {str(path)!r}") if bad.item() else None


def _damage(path: Path, rank: int, size: int) -> str | None:
    try:
        checkpoint.verify(path, rank, size)
    except checkpoint.DamagedError as error:
        return str(error)
    return None


def _there(steps: list[int]) -> str:
    return f"there are {', '.join(map(str, steps))}" if steps else "there is none"


def _before(steps: list[int]) -> str:
    if not steps:
        return "there is none before it"
    return f"the one before it is of step {steps[-1]}: add --checkpoint {steps[-1]}"


def check_not_given_up(folder: Path) -> None:
    """Say again why a run has ended for good, where a launcher tries it once more."""
    try:
        told: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return
    if told.get("reason"):
        raise ValueError(told["reason"])
