"""Where a run goes on, agreed on by all ranks; and that all ranks mean the same run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from natgrad.parallel import LostRanksError, World
from natgrad_lab.train import checkpoint, environment
from natgrad_lab.train.loop import Job
from natgrad_lab.train.ranks import decoded, encoded, everybody, on_first
from natgrad_lab.train.recipe import Recipe, described
from natgrad_lab.train.state import restore, without_free

FOLDER = "checkpoints"


def restarted(world: World) -> bool:
    """Say whether a launcher has started this rank, or any other, again after one has failed.

    Each host's launcher counts for itself: it does not count a restart that another host's has begun.
    """
    counted = torch.tensor([float(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))])
    world.max([counted])
    return counted.item() > 0


def check_agreement(recipe: Recipe, world: World, **options: Any) -> None:
    """Refuse a world whose ranks have been given different recipes or options, or run different versions."""
    told = without_free(described(recipe)) | options
    versions = {f"the version of {name}": environment.installed(name) for name in ("natgrad", "torch")}
    compare({**versions, "the fields of a recipe": sorted(told)}, world)  # else the next message has unlike lengths
    compare(told, world)


def compare(told: Mapping[str, Any], world: World) -> None:
    """Refuse values that are not the same on all ranks, by their names, which are."""
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
    the one before it; None: refuse it by name, and name the one before. Where none is good, nothing is begun anew.
    """
    steps, wrong = candidates(folder, asked, world), []
    while steps:
        path = folder / checkpoint.name_of(steps.pop())
        found = find_damage(path, world)
        if found is None:
            return path
        if fall_back is None:
            raise checkpoint.DamagedError(f"{found}; {before(steps)}")
        fall_back(found)
        wrong.append(found)
    if wrong:
        raise checkpoint.DamagedError(f"{wrong[0]}; none of {len(wrong)} checkpoints is good: --overwrite begins anew")
    return None


def candidates(folder: Path, asked: int | None, world: World) -> list[int]:
    """Steps of the checkpoints to choose from, rising: the one that was asked for, and those before it.

    As rank 0 sees them: others may see a shared folder later.
    """

    def look() -> str:
        steps = checkpoint.found(folder)
        if asked is not None and asked not in steps:
            raise ValueError(f"there is no checkpoint of step {asked} in {str(folder)!r}; {_there(steps)}")
        return json.dumps([step for step in steps if asked is None or step <= asked][-100:])

    message = encoded(on_first(world, look) or "")
    world.start([message])
    return json.loads(decoded(message))


def set_later_aside(folder: Path, step: int) -> None:
    """Take checkpoints after the one from which a run goes on out of the way: as the newest they would stay instead of
    those that are to come, and the next start would go on from them.
    """
    for later in checkpoint.found(folder):
        if later > step:
            checkpoint.set_aside(folder / checkpoint.name_of(later))


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


def before(steps: list[int]) -> str:
    """Say where to go on from instead of a bad checkpoint, when there are these before it."""
    if not steps:
        return "there is none before it: --overwrite begins anew"
    return f"the one before it is of step {steps[-1]}: add --checkpoint {steps[-1]}"


def restore_all(job: Job, path: Path, changes: bool) -> None:
    """Bring the jobs of all ranks to where a checkpoint was written; all raise what one of them finds wrong with it."""
    wrong = ""
    try:
        restore(job, path, changes)
    except checkpoint.DamagedError as error:
        wrong = str(error)
    except (torch.OutOfMemoryError, LostRanksError):
        raise
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        if "NATGRAD_DEBUG" in os.environ:
            raise
        wrong = (
            f"checkpoint {str(path)!r} cannot be used ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        )
    told = everybody(job.world, [wrong] if wrong else [])
    if told:
        others = checkpoint.found(path.parent)
        raise checkpoint.DamagedError(f"{told[0]}; {before([step for step in others if step < step_of(path)])}")


def step_of(path: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(path.name.rpartition("-")[2])


def check_not_given_up(folder: Path) -> None:
    """Say again why a run has ended for good, where a launcher tries it once more."""
    reason = ending(folder).get("reason")
    if reason:
        raise ValueError(reason)


def ending(folder: Path) -> dict[str, Any]:
    """Return how a run ended; nothing where it has not, or where that cannot be read."""
    try:
        told = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}
