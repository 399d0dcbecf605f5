"""Does measuring less cost accuracy? SP-NGD by default, against every step, against every step and every row.

    python benchmarks/longrun.py --data data/cifar100      both tasks; about 20 minutes on one core
    python benchmarks/longrun.py --show                    the tables of the committed results

Two small tasks with very large batches, on ResNet-8 with a cosine: digits, a third of the images in a batch, 200 steps;
10 classes of CIFAR-100 at 16x16, a quarter of the images in a batch, 80 steps. Same damping for all; the learning rate
of each is chosen from the same few by validation loss over all steps. Then five fresh seeds, the three taking turns,
judged on the test images. Trials are the comparison's (natgrad compare): each is one small file, so the same command
goes on after an interruption.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from natgrad.parallel import World
from natgrad_lab.compare.contenders import Contender
from natgrad_lab.compare.space import Choice
from natgrad_lab.compare.tasks import Task, find_task
from natgrad_lab.compare.trials import Trial, finite, merit, remember, remembered, run_trial
from natgrad_lab.data import Cifar100, Images, Source, Splits, hold_out
from natgrad_lab.data.augment import flip, pad_crop
from natgrad_lab.train import environment
from natgrad_lab.train.log import write_json
from natgrad_lab.train.optimizers import SpNgd

RESULTS = Path(__file__).parent / "results"
COMMAND = "python benchmarks/longrun.py --data PATH"
EARLY, FRESH = 100, (1, 2, 3, 4, 5)  # seeds
STEPS = {"digits": 200, "cifar100-small": 80}
SHARES = {"digits": 1 / 3, "cifar100-small": 1 / 4}
RATES = {"digits": (0.003, 0.01, 0.03, 0.1), "cifar100-small": (0.03, 0.1, 0.3)}
BASE = SpNgd()
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


def tasks(path: str) -> dict[str, Task]:
    """Both tasks, judged once, at the end of a run; CIFAR-100 from a folder of parquet files."""
    digits = find_task("digits")
    recipe = replace(digits.recipe, norm_samples=4096)
    small = replace(digits, name="cifar100-small", recipe=replace(recipe, data=SmallCifar(path)), points=1)
    return {"digits": replace(digits, recipe=recipe, points=1), "cifar100-small": small}


@dataclass(frozen=True)
class Study:
    """One task, and the folder in which its trials are remembered."""

    task: Task
    folder: Path

    @functools.cached_property
    def splits(self) -> dict[bool, Splits]:
        """What to learn from and what to be judged by: validation images, or the test's for final runs."""
        data, whole = self.task.recipe.data, self.task.recipe.data.load()
        tuning = data.tuning() if isinstance(data, SmallCifar) else hold_out(whole, self.task.held_out, seed=0)
        return {False: tuning, True: whole}

    def trial(self, contender: Contender, lr: float, seed: int, final: bool, steps: int) -> dict[str, Any]:
        """Return a trial as the comparison keeps it, remembered or made now."""
        splits = self.splits[final]
        batch = math.ceil(SHARES[self.task.name] * len(splits.train))
        asked = Trial(contender, {"lr": lr, "schedule": "cosine", "warm_up": 0.0}, batch, steps, seed, final)
        path = asked.file(self.task, self.folder / self.task.name)
        result = remembered(path, reuse=True)
        if result is None:
            result = run_trial(asked, self.task, splits, World(), lambda: False, lambda step: None)
            remember(path, result)
            print(f"{asked.title()}: {kept(result)}", flush=True)
        return result


def kept(result: dict[str, Any]) -> dict[str, Any]:
    """What a table needs of a trial: how it ended, the last training losses, times, how much was measured."""
    end = result["evaluations"][-1] if result["evaluations"] else {"accuracy": 0.0, "loss": None}
    steps = result["steps"]
    last = [math.nan if step["loss"] is None else step["loss"] for step in steps[-4:]]
    shares = [step["refreshed"] for step in steps if "refreshed" in step]
    return {
        "values": {"lr": result["values"]["lr"]},
        "seed": result["seed"],
        "accuracy": round(end["accuracy"], 4),
        "loss": rounded(math.nan if end["loss"] is None else end["loss"]),
        "train_loss": rounded(fmean(last)),
        "step_ms": round(1e3 * median(step["seconds"] for step in steps), 1),
        "mean_step_ms": round(1e3 * fmean(step["seconds"] for step in steps), 1),
        "refreshed": round(fmean(shares), 4) if shares else None,
    }


def rounded(value: float) -> float | None:
    """Four significant digits; None for what JSON has no number for."""
    return None if finite(value) is None else float(f"{value:.4g}")


def contenders(task: str) -> list[Contender]:
    """The default, and two that measure more."""
    settings = {
        "default": BASE,
        "every step": replace(BASE, refresh=1),
        "every step, every row": replace(BASE, refresh=1, rows_per_dim=None),
    }
    return [Contender(name, "natgrad", one, {"lr": Choice(RATES[task])}) for name, one in settings.items()]


def run(study: Study, steps: int) -> dict[str, Any]:
    """Choose each learning rate, then run all with fresh seeds."""
    entries = contenders(study.task.name)
    found = [{"name": one.name, "finals": [], **choose(study, one, steps)} for one in entries]
    for seed in FRESH:
        for one, contender in zip(found, entries):
            one["finals"].append(kept(study.trial(contender, one["chosen"]["lr"], seed, True, steps)))
    return {"steps": steps, "damping": BASE.damping, "length": BASE.length, "contenders": found}


def choose(study: Study, contender: Contender, steps: int) -> dict[str, Any]:
    """The learning rate with the lowest validation loss, and all that was tried."""
    trials = [study.trial(contender, lr, EARLY, False, steps) for lr in RATES[study.task.name]]
    chosen = min(trials, key=lambda one: merit([one]))["values"]
    edges = [name for name, one in contender.space.items() if one.at_edge(chosen[name])]
    return {"chosen": {"lr": chosen["lr"]}, "at_edge": edges, "tuning": [kept(one) for one in trials]}


def table(result: dict[str, Any]) -> str:
    """Accuracy, what it cost, and the difference to the default over the same seeds."""
    given = f"damping {result['damping']:g}, length {result['length']}"
    lines = [
        f"{result['steps']} steps, {given}, seeds {' '.join(map(str, seeds(result)))}",
        "",
        "| statistics | lr | test accuracy: mean (range) | minus default, points | last train loss | median ms a step "
        "| mean ms a step | refreshed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    base = column(result["contenders"][0], "accuracy")
    for one in result["contenders"]:
        accuracy, loss = column(one, "accuracy"), column(one, "train_loss")
        spread = f"{fmean(accuracy):.4f} ({min(accuracy):.4f} to {max(accuracy):.4f})"
        losses = f"{fmean(loss):.2g} ({min(loss):.2g} to {max(loss):.2g})"
        times = " | ".join(f"{fmean(column(one, name)):.0f}" for name in ("step_ms", "mean_step_ms"))
        refreshed = fmean(column(one, "refreshed"))
        rate = f"{one['chosen']['lr']:g}" + (" (end of range)" if one["at_edge"] else "")
        difference = apart(accuracy, base)
        lines.append(f"| {one['name']} | {rate} | {spread} | {difference} | {losses} | {times} | {refreshed:.0%} |")
    return "\n".join(lines)


def seeds(result: dict[str, Any]) -> list[int]:
    return [trial["seed"] for trial in result["contenders"][0]["finals"]]


def column(one: dict[str, Any], name: str) -> list[float]:
    """One value of all final runs; a loss that was no number counts as one."""
    return [math.nan if trial[name] is None else trial[name] for trial in one["finals"]]


def apart(accuracy: list[float], base: list[float]) -> str:
    """The mean difference in points and its standard error, seed by seed: the same seed starts at the same weights."""
    differences = [100 * (mine - its) for mine, its in zip(accuracy, base)]
    if not any(differences):
        return "0"
    return f"{fmean(differences):+.2f} ± {stdev(differences) / math.sqrt(len(differences)):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/cifar100", help="folder of CIFAR-100's parquet files (hub: uoft-cs)")
    parser.add_argument("--tasks", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--trials", type=Path, default=Path("runs/longrun"), help="where trials are remembered")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print the tables of the results in --out, run nothing")
    told = parser.parse_args()
    torch.set_num_threads(1)
    for name in told.tasks:
        path, task = told.out / f"longrun-{name}.json", tasks(told.data)[name]
        if not told.show:
            try:
                task.recipe.data.check()
            except ValueError as error:
                print(f"{name} is skipped: {error}", file=sys.stderr)
                continue
            result = run(Study(task, told.trials), STEPS[name])
            machine = environment.describe(World(), torch.device("cpu"))
            write_json(path, {"about": machine | {"command": COMMAND}, "task": name, **result})
        if path.exists():
            print(f"\n### {name}\n\n{table(json.loads(path.read_text()))}")


if __name__ == "__main__":
    main()
