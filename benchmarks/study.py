"""What the experiments share: two small tasks with very large batches, and trials that are remembered.

    digits           scikit-learn's digits, a third of the training images in a batch, 24 steps
    cifar100-small   10 classes of CIFAR-100 at 16x16, a quarter of the training images in a batch, 80 steps

Both train ResNet-8 by the library's own loop; the learning rate falls along a cosine. A trial is judged once, at its
end, on validation images (for choosing) or on the test's (for reporting). Its result is one small file named by a
digest of its settings, so the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from natgrad.parallel import World
from natgrad_lab.compare.trials import finite
from natgrad_lab.data import Cifar100, Digits, Images, Source, Splits, hold_out
from natgrad_lab.data.augment import flip, pad_crop
from natgrad_lab.models import CifarResNet
from natgrad_lab.train import environment
from natgrad_lab.train.log import write_json
from natgrad_lab.train.loop import Job, prepare, steps
from natgrad_lab.train.optimizers import Settings
from natgrad_lab.train.recipe import Recipe, described

RESULTS = Path(__file__).parent / "results"
CLASSES, LEARN, VALIDATE = 10, 150, 100  # of CIFAR-100's: the first labels, and images of each


@dataclass(frozen=True)
class SmallCifar(Source):
    """The first 10 fine labels of CIFAR-100, averaged over 2x2 pixels: 150 training images of each class."""

    path: str = "data/cifar100"

    def shape(self) -> tuple[int, int, int]:
        return (3, 16, 16)

    def classes(self) -> int:
        return CLASSES

    def check(self) -> None:
        Cifar100(self.path).check()

    def load(self) -> Splits:
        train, _, test = small_cifar(self.path)
        return Splits(train, test, shift_and_flip)

    def tuning(self) -> Splits:
        """The same training images, judged on others of the training set, 100 of each class."""
        train, validation, _ = small_cifar(self.path)
        return Splits(train, validation, shift_and_flip)


@functools.cache
def small_cifar(path: str) -> tuple[Images, Images, Images]:
    """Training, validation and test images; the last are all 1,000 of the ten classes."""
    whole = Cifar100(path).load()
    known, test = (averaged(images) for images in (whole.train, whole.test))
    places = [(known.labels == label).nonzero().flatten() for label in range(CLASSES)]
    learn, validate = (
        torch.cat([place[begin:end] for place in places]) for begin, end in ((0, LEARN), (LEARN, LEARN + VALIDATE))
    )
    return known.take(learn), known.take(validate), test


def averaged(images: Images) -> Images:
    """The images of the first classes at half of their height and width."""
    some = images.take((images.labels < CLASSES).nonzero().flatten())
    return replace(some, images=F.avg_pool2d(some.images.float(), 2), classes=CLASSES)


def shift_and_flip(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """CIFAR's usual augmentation at half of the size: shift by up to two pixels, mirror half of the images."""
    return flip(pad_crop(inputs, generator, padding=2), generator)


@dataclass(frozen=True)
class Task:
    """A problem with its batch, as a share of the training images, and its number of steps."""

    name: str
    data: Source
    share: float
    steps: int

    def splits(self, judged_on: str) -> Splits:
        """What to learn from and what to be judged by: "validation" or "test"."""
        if judged_on == "test":
            return self.data.load()
        if isinstance(self.data, SmallCifar):
            return self.data.tuning()
        return hold_out(self.data.load(), 1 / 6, seed=0)

    def recipe(self, optimizer: Settings, seed: int, length: int, samples: int) -> Recipe:
        """One run of `length` steps on `samples` training images."""
        model = CifarResNet(depth=8, widths=(16, 32, 64))
        batch = math.ceil(self.share * samples)
        return Recipe(self.data, model, optimizer, batch=batch, steps=length, seed=seed)


def tasks(path: str) -> dict[str, Task]:
    """Both tasks, CIFAR-100 from a folder of parquet files."""
    both = (Task("digits", Digits(), 1 / 3, 24), Task("cifar100-small", SmallCifar(path), 1 / 4, 80))
    return {task.name: task for task in both}


@dataclass(eq=False)
class Study:
    """One task, and the folder in which its trials are remembered."""

    task: Task
    folder: Path
    splits: dict[str, Splits] = field(default_factory=dict)

    def say(self, text: str) -> None:
        """Print a line at once, also into a file."""
        print(text, flush=True)

    def trial(self, optimizer: Settings, seed: int, judged_on: str, length: int) -> dict[str, Any]:
        """Return a trial's result, remembered or made now."""
        splits = self.loaded(judged_on)
        recipe = self.task.recipe(optimizer, seed, length, len(splits.train))
        settings = {"task": self.task.name, "judged_on": judged_on, **plain_values(recipe)}
        path = self.folder / f"{self.task.name}-{digest(settings)}.json"
        if not path.exists():
            result = outcome(prepare(recipe, World(), splits))
            write_json(path, {"settings": settings, **result})
            values = {name: value for name, value in settings["optimizer"].items() if name != "kind"}
            self.say(f"{judged_on} {length} steps, seed {seed}, {values}: {result}")
        return json.loads(path.read_text())

    def loaded(self, judged_on: str) -> Splits:
        """The task's images, read once."""
        if judged_on not in self.splits:
            self.splits[judged_on] = self.task.splits(judged_on)
        return self.splits[judged_on]


def outcome(job: Job) -> dict[str, Any]:
    """Train, judge once, and keep what a table needs: the last training loss, times, how much was measured."""
    told = list(steps(job))
    score = job.score()
    shares = [step.second_order["refreshed"] for step in told if "refreshed" in step.second_order]
    return {
        "accuracy": round(score.accuracy, 4),
        "loss": rounded(score.loss),
        "train_loss": rounded(statistics.fmean(step.loss for step in told[-4:])),
        "step_ms": round(1e3 * statistics.median(step.seconds for step in told), 1),
        "mean_step_ms": round(1e3 * statistics.fmean(step.seconds for step in told), 1),
        "refreshed": round(statistics.fmean(shares), 4) if shares else None,
    }


def rounded(value: float) -> float | None:
    """Four significant digits; None for what JSON has no number for."""
    return None if finite(value) is None else float(f"{value:.4g}")


def plain_values(recipe: Recipe) -> dict[str, Any]:
    """All that decides a run's result; where its data lie does not."""
    values = described(recipe)
    values["data"].pop("path", None)
    return json.loads(json.dumps(values))


def digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def merit(trial: dict[str, Any]) -> float:
    """What is chosen by: the validation loss, which of some hundred images says more than accuracy. Lower is better."""
    return math.inf if trial["loss"] is None else trial["loss"]


def about(script: str) -> dict[str, Any]:
    """The machine, the versions, the commit, and the command without anybody's paths."""
    record = environment.describe(World(), torch.device("cpu"))
    return {**record, "command": f"python benchmarks/{script} --data PATH"}


def options(script: str, text: str | None) -> argparse.Namespace:
    """What both scripts are told."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/cifar100", help="folder of CIFAR-100's parquet files (hub: uoft-cs)")
    parser.add_argument("--tasks", nargs="+", default=list(tasks("")), choices=list(tasks("")))
    parser.add_argument("--trials", type=Path, default=Path("runs") / script, help="where trials are remembered")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print the tables of the results in --out, run nothing")
    return parser.parse_args()


def main(
    script: str,
    text: str | None,
    run: Callable[[Study], dict],
    table: Callable[[dict], str],
    across: Callable[[list[dict]], str] | None = None,
) -> None:
    """Run a script's experiment on each task whose data are there, write the results and print the tables."""
    told = options(script, text)
    torch.set_num_threads(1)
    results = []
    for task in (tasks(told.data)[name] for name in told.tasks):
        path = told.out / f"{script}-{task.name}.json"
        if not told.show:
            try:
                task.data.check()
            except ValueError as error:
                print(f"{task.name} is skipped: {error}", file=sys.stderr)
                continue
            result = run(Study(task, told.trials))
            write_json(path, {"about": about(f"{script}.py"), "task": task.name, **result})
        if path.exists():
            results.append(json.loads(path.read_text()))
            print(f"\n### {task.name}\n\n{table(results[-1])}")
    if across and len(results) > 1:
        print(f"\n### One setting for all\n\n{across(results)}")
