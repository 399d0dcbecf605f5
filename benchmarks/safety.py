"""Does any optimizer, with its defaults and a learning rate from .03 to .3, ever make a loss rise above its start?

    python benchmarks/safety.py --data data/cifar100    (some hours on one core; stopped, it goes on)
    python benchmarks/safety.py --show                  (the table of the committed results)

Every optimizer of natgrad takes 60 steps (or all the task has, where it has fewer) on every task of the comparison that
runs on a CPU, at every size of batch there, with a constant learning rate and without a warm-up: the hardest a user can
ask for. What is told is the largest training loss after the first step over that of the first step, a mean over five
steps where a batch is below 1,000 predictions, and the last over the first.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from record import Record, read

from natgrad.parallel import World
from natgrad_lab.compare.contenders import CONTENDERS
from natgrad_lab.compare.protocol import samples_of
from natgrad_lab.compare.tasks import Batch, Task, find_task
from natgrad_lab.data import Splits
from natgrad_lab.schedules import Constant
from natgrad_lab.train.loop import prepare, steps
from natgrad_lab.train.malloc import keep_freed_memory

RESULTS = Path(__file__).parent / "results" / "safety.json"
CASES: dict[str, tuple[Batch, ...]] = {
    "digits": (64, 128, 256, 479, "full"),
    "charlm": (64, 128, 512),
    "cifar100-small": (125, 500, "full"),
    "cifar100-16": (250, 1000, 5000, 12500, "full"),
    "text": (32, 256),
    "text-tied": (32, 256),
    "cifar100-32": (4096,),
}
RATES = (0.03, 0.1, 0.3)
MOST = 60
NOISE = 1.02
"""By so much a mean loss may be above the first one without having risen."""
FEW = 1000
"""Predictions of a step below which its loss is too noisy to be looked at alone."""


def losses_of(task: Task, batch: Batch, name: str, lr: float, splits: Splits) -> list[float]:
    """The training losses of a run, until one is no number."""
    contender = next(one for one in CONTENDERS if one.name == name)
    recipe = replace(
        task.recipe,
        optimizer=replace(contender.base, lr=lr),
        schedule=Constant(),
        batch=samples_of(batch, splits),
        steps=min(MOST, task.steps_of(batch)),
        seed=100,
    )
    found: list[float] = []
    for step in steps(prepare(recipe, World(), splits)):
        found.append(step.loss)
        if not math.isfinite(step.loss):
            break
    return found


def row(name: str, lr: float, batch: int, losses: list[float]) -> dict[str, Any]:
    """The largest loss after the first step, and the last one, over the first."""
    width = 5 if batch < FEW else 1
    smooth = [fmean(losses[k : k + width]) for k in range(1, len(losses) - width + 1)]
    sound = all(map(math.isfinite, losses))
    worst = max(smooth) / losses[0] if sound else None
    return {"optimizer": name, "lr": lr, "worst": worst, "last": smooth[-1] / losses[0] if sound else None}


def cases(data: str, tasks: list[str], names: list[str]) -> Iterator[tuple[Task, Batch, str]]:
    for task_name in tasks:
        task = find_task(task_name)
        task = task.located(data) if task_name.startswith("cifar") else task
        for batch in CASES[task_name]:
            for name in names:
                yield task, batch, name


def table(content: dict[str, Any]) -> str:
    """Worst / last loss over the first at each learning rate; bold where it rose."""
    names = list(dict.fromkeys(case["optimizer"] for case in content["cases"]))
    head = ["task, batch", *names]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' --- |' * len(names)}"]
    for title in dict.fromkeys(case["case"] for case in content["cases"]):
        cells = []
        for name in names:
            rows = [r for c in content["cases"] if (c["case"], c["optimizer"]) == (title, name) for r in c["rows"]]
            cells.append(", ".join(shown(r) for r in rows) or "-")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(row: dict[str, Any]) -> str:
    if row["worst"] is None:
        return "**diverged**"
    text = f"{row['worst']:.2f} {row['last']:.2f}"
    return f"**{text}**" if row["worst"] > NOISE else text


def main() -> None:
    ours = [one.name for one in CONTENDERS if one.kind == "natgrad"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/cifar100", help="folder with CIFAR-100's parquet files")
    parser.add_argument("--tasks", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--optimizers", nargs="+", default=ours, choices=ours)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print the table of the results")
    told = parser.parse_args()
    if not told.show:
        torch.set_num_threads(1)
        keep_freed_memory()
        record = Record(told.out, "cpu")
        loaded: dict[str, Splits] = {}
        for task, batch, name in cases(told.data, told.tasks, told.optimizers):
            case = {"case": f"{task.name}, {batch}", "optimizer": name, "rates": list(RATES), "most": MOST}
            if record.find(case) is None:
                if task.name not in loaded:
                    loaded = {task.name: task.recipe.data.load()}
                splits = loaded[task.name]
                count = samples_of(batch, splits)
                rows = [row(name, lr, count, losses_of(task, batch, name, lr, splits)) for lr in RATES]
                record.add(case, rows)
                print(f"{case['case']}, {name}: {', '.join(map(shown, rows))}", flush=True)
    print(table(read(told.out)))


if __name__ == "__main__":
    main()
