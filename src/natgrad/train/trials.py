"""One training run of a comparison, and the file that remembers it, so that a comparison can be taken up
again.

A trial in tuning is judged once, at its end, on images held out of the training set. A final trial trains on
all training images and is judged on the test images after every step; judging costs no training time.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from natgrad.data import Splits
from natgrad.parallel import World
from natgrad.train.log import write_json
from natgrad.train.loop import Job, Step, prepare, steps
from natgrad.train.recipe import Recipe
from natgrad.train.stop import Stop
from natgrad.train.tasks import Contender, Task


@dataclass(frozen=True)
class Trial:
    """A contender at one point of its grid, with a seed and a number of steps."""

    contender: Contender
    values: dict[str, Any]
    seed: int
    steps: int
    final: bool

    def file(self, folder: Path) -> Path:
        """Return where the result is remembered; different trials have different files."""
        name = json.dumps([self.contender.name, self.values, self.seed, self.steps, self.final], sort_keys=True)
        kind = "final" if self.final else "tuning"
        return folder / "trials" / f"{kind}-{self.contender.name}-{hashlib.sha256(name.encode()).hexdigest()[:12]}.json"

    def title(self) -> str:
        """Return the trial in words."""
        values = " ".join(f"{name}={value}" for name, value in self.values.items())
        return f"{self.contender.name}, {values}, {self.steps} steps, seed {self.seed}"

    def recipe(self, task: Task, batch: int) -> Recipe:
        """Return the run that the trial is; the learning rate falls along a cosine to zero for everyone."""
        settings = self.contender.settings(self.values)
        return Recipe(task.data, task.model, settings, batch=batch, steps=self.steps, seed=self.seed)


def run_trial(
    trial: Trial, recipe: Recipe, splits: Splits, world: World, stop: Stop, tick: Callable[[Step], None]
) -> Any:
    """Train and judge, calling `tick` after each step; return plain values, or None where stopped."""
    job = prepare(recipe, world, splits)
    told, judged = [], []
    for step in steps(job, stop):
        if step.stop:
            return None
        tick(step)
        told.append(step_values(step))
        if trial.final or step.step == job.steps:
            judged.append({"step": step.step, "elapsed": step.elapsed, **judge(job, trial.final)})
    return {
        "contender": trial.contender.name,
        "values": trial.values,
        "seed": trial.seed,
        "budget": trial.steps,
        "batch": recipe.batch,
        "final": trial.final,
        "steps": told,
        "evaluations": judged,
    }


def step_values(step: Step) -> dict[str, Any]:
    """Return what the report needs of a step."""
    values = {
        "step": step.step,
        "loss": finite(step.loss),
        "lr": step.lr,
        "seconds": step.seconds,
        "elapsed": step.elapsed,
        "stages": step.stages,
    }
    return {**values, **step.second_order}


def judge(job: Job, train_too: bool) -> dict[str, float | None]:
    """Return accuracy and loss on the judging split, and the loss on all training images where asked for."""
    score = job.score()
    values = {"accuracy": score.accuracy, "loss": finite(score.loss)}
    if train_too:
        values["train_loss"] = finite(job.score("train").loss)
    return values


def finite(value: float) -> float | None:
    """Return None for what JSON has no number for."""
    return value if math.isfinite(value) else None


def remembered(trial: Trial, folder: Path) -> Any:
    """Return an earlier result of the trial, or None."""
    path = trial.file(folder)
    return json.loads(path.read_text()) if path.exists() else None


def remember(trial: Trial, folder: Path, result: Any) -> None:
    """Keep a trial's result."""
    write_json(trial.file(folder), result)


def ranking(results: list[list[Any]]) -> list[int]:
    """Return places by mean validation loss over a point's runs, lowest first.

    Loss, not accuracy: of a few hundred images held out, one is half a percent, and many points tie.
    """

    def merit(runs: list[Any]) -> float:
        last = [run["evaluations"][-1] for run in runs]
        return fmean(math.inf if end["loss"] is None else end["loss"] for end in last)

    return sorted(range(len(results)), key=lambda place: merit(results[place]))


def agree(world: World, values: list[int], device: torch.device) -> list[int]:
    """Return rank 0's values on every rank; the others give as many of any."""
    shared = torch.tensor([float(value) if world.rank == 0 else 0.0 for value in values], device=device)
    world.sum([shared])
    return [int(value) for value in shared.tolist()]
