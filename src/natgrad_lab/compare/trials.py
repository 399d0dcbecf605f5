"""One training run of a comparison, and the file that remembers it, so that a comparison can be taken up again.

A trial in tuning is judged once, at its end, on samples held out of the training set. A final one trains on all
training samples and is judged on the test's along the way; judging costs no training time. A loss that is no number in
two steps running ends a trial: it has diverged, and counts as one that was used.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from natgrad.parallel import World
from natgrad_lab.compare.contenders import Contender
from natgrad_lab.compare.protocol import made_by, samples_of
from natgrad_lab.compare.tasks import Batch, Task
from natgrad_lab.data import Images, Splits, hold_out
from natgrad_lab.train.log import write_json
from natgrad_lab.train.loop import Job, Step, prepare, steps
from natgrad_lab.train.recipe import Recipe, described


@dataclass(frozen=True)
class Trial:
    """A contender at one point of its space, at a size of batch, with a number of steps and a seed."""

    contender: Contender
    values: dict[str, Any]
    batch: Batch
    steps: int
    seed: int
    final: bool
    ranks: int = 1

    def title(self) -> str:
        """Return the trial in words."""
        values = " ".join(f"{name}={value}" for name, value in self.values.items())
        return f"{self.contender.name}, batch {self.batch}, {self.steps} steps, seed {self.seed}, {values}"

    def recipe(self, task: Task, splits: Splits) -> Recipe:
        """Return the run that the trial is."""
        return replace(
            task.recipe,
            optimizer=self.contender.settings(self.values),
            schedule=self.contender.schedule(self.values),
            batch=samples_of(self.batch, splits),
            steps=self.steps,
            seed=self.seed,
        )

    def file(self, task: Task, folder: Path) -> Path:
        """Return where the result is remembered: trials with different results have different files."""
        settings = self.contender.settings(self.values), self.contender.schedule(self.values)
        told = [*map(described, settings), self.batch, self.steps, self.seed, self.final, self.ranks]
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
        kind = "final" if self.final else "tuning"
        return folder / "trials" / f"{kind}-{self.contender.name}-{self.batch}-{digest}.json"


def learning(task: Task, splits: Splits, final: bool) -> Splits:
    """Return what a trial learns from and is judged by."""
    whole = splits if final else hold_out(splits, task.held_out, seed=0)
    return replace(whole, test=some_of(whole.test, task.judged))


def some_of(images: Images, most: int | None) -> Images:
    """Return at most so many samples, evenly spread; None: all."""
    if most is None or most >= len(images):
        return images
    return images.take(torch.linspace(0, len(images) - 1, most).long())


def run_trial(
    trial: Trial, task: Task, splits: Splits, world: World, stop: Callable[[], bool], tick: Callable[[Step], None]
) -> Any:
    """Train and judge, calling `tick` after each step; return plain values, or None where stopped."""
    job = prepare(trial.recipe(task, splits), world, splits)
    places = judged_at(trial.steps, task.points) if trial.final else {trial.steps}
    told: list[dict[str, Any]] = []
    judged: list[dict[str, Any]] = []
    try:
        for step in steps(job, stop):
            if step.stop:
                return None
            tick(step)
            told.append(step_values(step))
            if diverged(told):
                break
            if step.step in places:
                judged.append({"step": step.step, "elapsed": step.elapsed, **judge(job)})
    except torch.linalg.LinAlgError:  # an optimizer that cannot factor its matrices has diverged
        told = told[: trial.steps - 1]
    done = len(told) == trial.steps and not diverged(told)
    return {
        "contender": trial.contender.name,
        "values": trial.values,
        "batch": trial.batch,
        "samples": job.recipe.batch,
        "of": len(splits.train),
        "seed": trial.seed,
        "budget": trial.steps,
        "final": trial.final,
        "diverged": None if done else len(told),
        "train_loss": train_loss(job, task.judged) if trial.final and done else None,
        "steps": told,
        "evaluations": judged if done else [],
        "made_by": made_by(),
    }


def judged_at(count: int, points: int) -> set[int]:
    """Return the steps after which a final run is judged, `points` of them, the last among them."""
    return {math.ceil(count * place / points) for place in range(1, points + 1)}


def diverged(told: list[dict[str, Any]]) -> bool:
    """Say whether the last two losses were no numbers."""
    return len(told) > 1 and told[-1]["loss"] is None and told[-2]["loss"] is None


def step_values(step: Step) -> dict[str, Any]:
    """Return what the report needs of a step."""
    values = {"step": step.step, "loss": finite(step.loss), "seconds": step.seconds, "stages": step.stages}
    return {
        **values,
        **{name: step.second_order[name] for name in ("refreshed", "traffic") if name in step.second_order},
    }


def judge(job: Job) -> dict[str, float | None]:
    """Return accuracy and loss on the judging split."""
    score = job.score()
    return {"accuracy": score.accuracy, "loss": finite(score.loss)}


def train_loss(job: Job, most: int | None) -> float | None:
    """Return the loss on the training samples, on so many of them where a number is given."""
    some = replace(job.splits, train=some_of(job.splits.train, most))
    return finite(replace(job, splits=some).score("train").loss)


def finite(value: float) -> float | None:
    """Return None for what JSON has no number for."""
    return value if math.isfinite(value) else None


def remembered(path: Path, reuse: bool) -> Any:
    """Return an earlier result, or None; results of other code count where they are to be used again."""
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
    except ValueError:
        return None
    return result if reuse or result["made_by"] == made_by() else None


def remember(path: Path, result: Any) -> None:
    """Keep a trial's result."""
    write_json(path, result)


def merit(runs: list[Any]) -> float:
    """What is chosen by: the mean loss on the held-out samples over a point's runs, infinite where one diverged.

    Loss, not accuracy: of a few hundred samples held out, one is half a percent, and many points tie.
    """
    ends = [run["evaluations"][-1]["loss"] if run["evaluations"] else None for run in runs]
    return fmean(math.inf if end is None else end for end in ends)


def agree(world: World, values: list[int], device: torch.device) -> list[int]:
    """Return rank 0's values on every rank; the others give as many of any."""
    shared = torch.tensor([float(value) if world.rank == 0 else 0.0 for value in values], device=device)
    world.sum([shared])
    return [int(value) for value in shared.tolist()]
