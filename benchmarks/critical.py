"""Critical batch size: the batch from which on more samples a step save too few steps, one number for each optimizer.

    python benchmarks/critical.py --data data/cifar100      (about ten hours on one core; stopped, it goes on)
    python benchmarks/critical.py --show                    (the table of the committed results)

The task is CIFAR-100 at 16x16 on ResNet-8 (cifar100-16 of the comparison), all 50,000 training images. A run ends
where 30 % of the test images are right, between two steps by a straight line between two evaluations, BatchNorm's
statistics estimated anew. The learning rate is constant after a warm-up of five steps. For every optimizer and batch it
is searched on a grid of factors of two, on seed 0, from what was best at the batch before: up and down until both
sides need more steps. What is quoted are the means over fresh seeds at that rate; everything else stays as the
optimizer has it. An optimizer's batches end where its steps are three times those of linear scaling: still larger ones
would say nothing of its critical batch size, and cost hours.

With linear scaling twice the batch needs half of the steps. The critical batch size is where steps are 20 % above that
(Zhang et al. 2024, arXiv 2410.21676, section 2), counted from the batch that needs the fewest samples, and read off a
straight line between measured batches in log-log. `>` says that no measured batch was above.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from record import git, machine, read

import natgrad
from natgrad.parallel import World
from natgrad_lab.compare.tasks import find_task
from natgrad_lab.data import Splits
from natgrad_lab.report.critical import ABOVE, critical_batch
from natgrad_lab.report.style import look
from natgrad_lab.schedules import Constant, WarmUp
from natgrad_lab.train.log import write_json
from natgrad_lab.train.loop import Job, prepare, steps
from natgrad_lab.train.malloc import keep_freed_memory
from natgrad_lab.train.optimizers import AdamW, Lars, Muon, Settings, Sgd, Soap, SpNgd
from natgrad_lab.train.recipe import described

RESULTS = Path(__file__).parent / "results" / "critical.json"
PLOT = Path(__file__).parents[1] / "docs" / "critical.svg"
BATCHES = (250, 500, 1000, 2000, 4000, 8000, 16000, 32000, 50000)
TARGET = 0.3
WARM_UP = 5
NEAR = 3.2
"""The training loss below which a run is judged at all: at the target it is about 2.9."""
FAR = 3.0
FRESH = (1, 2)
MOST_LOST = 4
"""Learning rates in one direction that may miss the target before the other direction is tried."""
CONTENDERS: dict[str, tuple[Settings, float, str]] = {
    "SP-NGD": (SpNgd(), 0.05, "#D55E00"),
    "SGD": (Sgd(lr=0.1, nesterov=True), 0.2, "#08519C"),
    "Muon": (Muon(), 0.025, "#006D2C"),
    "SOAP": (Soap(), 0.01, "#41AB5D"),
    "AdamW": (AdamW(), 0.005, "#6BAED6"),
    "LARS": (Lars(), 10.0, "#7A7A7A"),
}
"""By name: settings, the learning rate at which the search of the smallest batch begins, and a colour."""


@dataclass(frozen=True)
class Runs:
    """Runs to the target, each remembered as one file."""

    splits: Splits
    folder: Path

    def __call__(self, name: str, batch: int, lr: float, seed: int, most: int) -> float:
        """Steps to the target; infinite where they are more than `most`, or the run has diverged."""
        settings = at_rate(CONTENDERS[name][0], lr)
        path = self.folder / f"{name}-{batch}-{lr:g}-{seed}.json"
        told = {"optimizer": described(settings), "target": TARGET, "warm_up": WARM_UP}
        if path.exists():
            known = json.loads(path.read_text())
            if known["settings"] != json.loads(json.dumps(told)):
                raise SystemExit(f"{path} holds a run with other settings; remove it, or give another --trials")
            if known["steps"] is not None or known["diverged"] or known["most"] >= most:
                return known["steps"] or math.inf
        job = self.job(settings, batch, seed, most)
        reached = arrival(job)
        found = {"steps": reached, "most": most, "diverged": reached is None and job.done < most}
        write_json(path, {"settings": told, **found, "seconds": round(job.elapsed, 1)})
        print(f"{name}, batch {batch}, lr {lr:g}, seed {seed}: {found}", flush=True)
        return reached or math.inf

    def job(self, settings: Settings, batch: int, seed: int, most: int) -> Job:
        recipe = replace(
            find_task("cifar100-16").recipe,
            optimizer=settings,
            schedule=WarmUp(Constant(), length=min(WARM_UP / most, 0.999), start=1 / WARM_UP),
            batch=batch,
            steps=most,
            seed=seed,
        )
        return prepare(recipe, World(), self.splits)


def at_rate(settings: Settings, lr: float) -> Settings:
    """The settings with another learning rate; Muon's for the rest goes with it."""
    rest = {"rest_lr": settings.rest_lr * lr / settings.lr} if isinstance(settings, Muon) else {}
    return replace(settings, lr=lr, **rest)


def arrival(job: Job) -> float | None:
    """Steps at which the test accuracy passes the target; None where it does not, or the loss is no number."""
    losses: list[float] = []
    before, due = (0, 0.0), 0
    for step in steps(job):
        losses.append(step.loss)
        if not math.isfinite(step.loss):
            return None
        recent = losses[-math.ceil(4000 / job.recipe.batch) :]
        if step.step < due or fmean(recent) > NEAR:
            continue
        now = (step.step, job.score().accuracy)
        if now[1] >= TARGET:
            return before[0] + (now[0] - before[0]) * (TARGET - before[1]) / (now[1] - before[1])
        before, due = now, max(step.step + 1, math.ceil(1.03 * step.step))
    return None


def search(
    runs: Callable[..., float], name: str, batch: int, near: float, most: int
) -> tuple[float, dict[float, float]]:
    """The best learning rate on seed 0, and the steps at each that was tried."""
    tried: dict[float, float] = {}

    def at(lr: float) -> float:
        least = min(tried.values(), default=math.inf)
        tried[lr] = runs(name, batch, lr, 0, most if math.isinf(least) else min(most, math.ceil(least)))
        return tried[lr]

    at(near)
    for factor in (2.0, 0.5):
        lr = min(tried, key=lambda lr: tried[lr])
        lost = 0
        while (lr := lr * factor) not in tried and lost < MOST_LOST:
            before = min(tried.values())
            lost += at(lr) == math.inf
            if tried[lr] >= before < math.inf:
                break
    return min(tried, key=lambda lr: tried[lr]), tried


def measured(
    runs: Callable[..., float], name: str, batches: Sequence[int], seeds: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """One batch after another, each beginning at the learning rate and the steps of the last."""
    near, most = CONTENDERS[name][1], 5000
    least = math.inf
    for batch in batches:
        lr, tried = search(runs, name, batch, near, most)
        if math.isinf(tried[lr]):
            print(f"{name}, batch {batch}: no learning rate reached the target in {most} steps", flush=True)
            return
        most = math.ceil(1.3 * tried[lr]) + 5
        fresh = [runs(name, batch, lr, seed, 2 * most) for seed in seeds]
        near = lr
        yield {
            "optimizer": name,
            "batch": batch,
            "lr": lr,
            "tried": {f"{lr:g}": told(count) for lr, count in sorted(tried.items())},
            "tuning": told(tried[lr]),
            "fresh": [told(count) for count in fresh],
        }
        least = min(least, batch * tried[lr])
        if batch * tried[lr] > FAR * least:
            return


def told(count: float) -> float | None:
    """Steps as JSON has them, which knows no infinity."""
    return round(count, 2) if math.isfinite(count) else None


def count_of(row: dict[str, Any]) -> float:
    """Steps of a row: the mean over fresh seeds, or what tuning had where none were run."""
    return fmean(math.inf if one is None else one for one in row["fresh"]) if row["fresh"] else row["tuning"]


def critical(rows: list[dict[str, Any]]) -> tuple[float, bool]:
    """The critical batch size of one optimizer, and whether a batch above it was measured."""
    points = [(float(row["batch"]), count_of(row)) for row in rows]
    return critical_batch(points) or (points[0][0], False)


def by_optimizer(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["optimizer"], []).append(row)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Steps to the target by batch, with the learning rate in parentheses, and the critical batch size."""
    head = ["optimizer", *(f"{batch:,}" for batch in BATCHES), "critical batch"]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for name, own in by_optimizer(rows).items():
        cells = {row["batch"]: f"{count_of(row):.3g} ({row['lr']:.3g})" for row in own}
        size, seen = critical(own)
        size = round(size, 1 - math.floor(math.log10(size)))
        shown = f"{'' if seen else '> '}{size:,.0f}"
        lines.append(f"| {' | '.join([name, *(cells.get(batch, '-') for batch in BATCHES), shown])} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Steps to the target against the batch, log-log, each with its line of linear scaling and its critical batch."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    for name, own in by_optimizer(rows).items():
        colour = CONTENDERS[name][2]
        batches, counts = [row["batch"] for row in own], [count_of(row) for row in own]
        axes.plot(batches, counts, "o-", color=colour, markersize=4, label=name)
        least = min(batch * count for batch, count in zip(batches, counts))
        axes.plot(batches, [least / batch for batch in batches], ":", color=colour, linewidth=0.9)
        size, seen = critical(own)
        if seen:
            axes.plot([size], [ABOVE * least / size], "|", color=colour, markersize=16, markeredgewidth=2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    shown = [batch for batch in BATCHES if batch <= max(row["batch"] for row in rows)]
    axes.set_xticks(shown, [f"{batch:,}" for batch in shown], fontsize=8)
    axes.set_yticks([10, 20, 50, 100, 200, 500, 1000])
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0.8 * min(map(count_of, rows)), 1.25 * max(map(count_of, rows)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("samples in a step")
    axes.set_ylabel(f"steps to {TARGET:.0%} test accuracy")
    axes.set_title("Steps to the target; dotted: linear scaling; bars: critical batch", fontsize=9.5)
    axes.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/cifar100", help="folder with CIFAR-100's parquet files")
    parser.add_argument("--optimizers", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(FRESH), help="fresh seeds at the chosen rate")
    parser.add_argument("--trials", type=Path, default=Path("runs/critical"), help="where single runs are remembered")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print the table of the results")
    told = parser.parse_args()
    if not told.show:
        torch.set_num_threads(1)
        keep_freed_memory()
        told.trials.mkdir(parents=True, exist_ok=True)
        runs = Runs(find_task("cifar100-16").located(told.data).recipe.data.load(), told.trials)
        rows = [row for name in told.optimizers for row in measured(runs, name, told.batches, tuple(told.seeds))]
        about = {
            "machine": machine("cpu"),
            "torch": torch.__version__,
            "natgrad": natgrad.__version__,
            "commit": git("rev-parse", "--short", "HEAD"),
            "command": "python benchmarks/critical.py --data PATH",
        }
        write_json(told.out, {"about": about, "target": TARGET, "above": ABOVE, "rows": rows})
    rows = read(told.out)["rows"]
    if told.out == RESULTS:
        with look():
            draw(rows).savefig(PLOT, metadata={"Date": None})
    print(table(rows))


if __name__ == "__main__":
    main()
