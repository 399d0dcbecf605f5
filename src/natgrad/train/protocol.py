"""How optimizers are compared: the numbers of a comparison, what is wrong with them, and what they decide.

Everyone gets the same number of tuning trials, steps, samples and seeds, and the same shape of schedule.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from natgrad.data import Splits
from natgrad.parallel import World
from natgrad.train import machine
from natgrad.train.recipe import described
from natgrad.train.run import pick_device
from natgrad.train.tasks import Task


@dataclass(frozen=True)
class Protocol:
    """How a comparison is made."""

    ranks: int = 1
    """Processes to start on this machine; under torchrun its own ranks count."""
    out: str | None = None
    """Folder for the results; None: runs/compare- and the task's name."""
    trials: int = 16
    """Points of its grid that each contender may try."""
    finalists: int = 6
    """The best of these points, which are tried with two more seeds before one is chosen."""
    seeds: int = 3
    """Fresh seeds for the final runs."""
    steps: int | None = None
    """Steps of a run; None: the task's."""
    batch: int | None = None
    """Samples in a step, over all ranks; None: the task's share of the training images."""
    held_out: float = 1 / 6
    """Share of the training images on which tuning is judged."""
    contenders: tuple[str, ...] = ()
    """Names of those to compare with the baseline; all where none is named."""
    overwrite: bool = False
    """Forget the results of another comparison in that folder."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""

    def folder(self, task: Task) -> Path:
        return Path(self.out or f"runs/compare-{task.name}")

    def steps_of(self, task: Task) -> int:
        return self.steps if self.steps is not None else task.steps

    def batch_of(self, task: Task, splits: Splits) -> int:
        return self.batch if self.batch is not None else math.ceil(task.batch_share * len(splits.train))


def check(task: Task, protocol: Protocol) -> None:
    """Raise ValueError for anything that can be known to be wrong before processes are started."""
    for name in ("ranks", "trials", "finalists", "seeds", "steps", "batch"):
        value = getattr(protocol, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1; set --{name}")
    if not 0 < protocol.held_out < 1:
        raise ValueError(f"held_out={protocol.held_out:g} must lie between 0 and 1; set --held-out")
    pick_device(protocol.device, World())
    task.data.check()
    for contender in task.chosen(protocol.contenders):
        contender.points(protocol.trials)
    if protocol.overwrite:
        return
    folder, plan = protocol.folder(task), plan_of(task, protocol)
    if folder.exists() and any(folder.iterdir()) and earlier_plan(folder) != plan:
        raise ValueError(f"--out {str(folder)!r} holds something else; add --overwrite, or name another folder")


def plan_of(task: Task, protocol: Protocol) -> Any:
    """Return all that decides the results, as JSON gives it back; only equal plans share results."""
    contenders = [
        {
            "name": contender.name,
            "base": described(contender.base),
            "space": dict(contender.space),
            "share": contender.share,
        }
        for contender in task.chosen(protocol.contenders)
    ]
    plan = {
        "task": {"name": task.name, "data": described(task.data), "model": described(task.model)},
        "contenders": contenders,
        "steps": protocol.steps_of(task),
        "batch": protocol.batch or task.batch_share,
        "held_out": protocol.held_out,
        "trials": protocol.trials,
        "finalists": protocol.finalists,
        "seeds": protocol.seeds,
        "versions": {name: machine.installed(name) for name in ("natgrad", "torch")},
        "commit": machine.commit(),
    }
    return json.loads(json.dumps(plan))


def earlier_plan(folder: Path) -> Any:
    """Return the plan of a comparison in this folder, None where there is none."""
    path = folder / "plan.json"
    return json.loads(path.read_text()) if path.exists() else None
