"""The longest and the mean step under every rule of refresh, and the loss that a run reaches.

    python benchmarks/budget.py --data data/cifar100     (40 minutes on a busy core; stopped, it goes on)
    python benchmarks/budget.py --show                   (the tables of the committed results)

Steps are counted in operations as `Budget` counts them (natgrad/budget.py), in units of a step's two passes: 1.5 is a
step in which measuring and factoring take half as much as the passes. Nothing is timed. A rule without a budget is
counted as the same rule under a budget in which everything fits, which trains alike to the last bit. The first step
measures everything under every rule and is left out. The tasks are the comparison's, on one rank, with SPNGD(lr=0.1)
and a cosine. Losses and accuracies are means over seeds, on held-out samples but for the training loss.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from record import Record, read

from natgrad.budget import Bill, Item, holder_work
from natgrad.layers.op_cost import price
from natgrad.parallel import World
from natgrad_lab.compare.protocol import samples_of
from natgrad_lab.compare.tasks import Batch, Task, find_task
from natgrad_lab.compare.trials import learning
from natgrad_lab.data import Splits
from natgrad_lab.models import ImageResNet
from natgrad_lab.plan.machines import named
from natgrad_lab.plan.scaling import Network, Planner
from natgrad_lab.train.loop import prepare, steps
from natgrad_lab.train.optimizers import SpNgd

RESULTS = Path(__file__).parent / "results" / "budget.json"
ALL = 1e6
"""A share of a step into which everything fits."""
RULES = {
    "Adaptive()": SpNgd(refresh_share=ALL),
    "Every(1)": SpNgd(refresh_share=ALL, refresh=1),
    "Every(10)": SpNgd(refresh_share=ALL, refresh=10),
    "Budget(0.05)": SpNgd(refresh_share=0.05),
    "Budget(0.2)": SpNgd(refresh_share=0.2),
}
LAST = 4
"""Steps over which the last training loss is averaged."""


@dataclass(frozen=True)
class Case:
    """A task at a size of batch for so many steps.

    fixed: where steps are counted and nothing is learned, how many are enough for rules of a fixed interval.
    """

    task: str
    batch: Batch
    steps: int
    seeds: tuple[int, ...] = (100,)
    fixed: int | None = None

    @property
    def title(self) -> str:
        net = {"cifar100-32": "ResNet-20 on CIFAR-100", "charlm": "transformer on characters"}.get(self.task, self.task)
        return f"{net}, batch {self.batch}, {self.steps} steps"


CASES = (
    Case("digits", 64, 48, (100, 101, 102)),
    Case("digits", "full", 10, (100, 101, 102)),
    Case("charlm", 64, 60),
    Case("cifar100-32", 128, 16, fixed=12),
    Case("cifar100-32", 1024, 6, fixed=2),
)


def run(task: Task, splits: Splits, case: Case, settings: SpNgd, count: int, seed: int) -> dict[str, Any]:
    """One run, in numbers; the schedule is that of all the case's steps."""
    batch = samples_of(case.batch, splits)
    recipe = replace(task.recipe, optimizer=settings, batch=batch, steps=case.steps, seed=seed, channels_last=False)
    job = prepare(recipe, World(), splits)
    spent: list[float] = []
    shares: list[float] = []
    losses: list[float] = []
    for step, _ in zip(steps(job), range(count)):
        spent.append(job.optimizer.spent)
        shares.append(job.optimizer.refreshed)
        losses.append(step.loss)
    whole = count == case.steps
    score = job.score() if whole and case.fixed is None else None
    return {
        "longest": 1 + max(spent[1:]),
        "mean": 1 + fmean(spent[1:]),
        "measuring": fmean(share > 0 for share in shares[1:]),
        "refreshed": fmean(shares[1:]),
        "train_loss": fmean(losses[-LAST:]) if whole else None,
        "loss": None if score is None else score.loss,
        "accuracy": None if score is None else score.accuracy,
        "piece": largest(job.optimizer),
    }


def largest(optimizer: Any) -> float:
    """The largest piece of work that a budget cannot cut, in steps."""
    pieces = []
    for cell in optimizer.cells:
        counts = [cell.numbers[f"{key}_budget"][1:] for key in cell.keys]
        pieces += [sum(m + t for m, t, _ in counts), sum(f for _, _, f in counts)]
    return max(pieces) / optimizer.engine.spending.passes


RANKS = (1, 64, 1024)
SHARE = 0.05
IMAGES = 32


def planned(ranks: int) -> list[dict[str, Any]]:
    """ResNet-50 on so many ranks, counted by the planner without running it: all stale, and the least of a budget."""
    network = Network("ResNet-50", lambda: ImageResNet(50).build((3, 224, 224), 1000), (3, 224, 224))
    account = Planner(network, named("cpu")).account(SpNgd(refresh=1), ranks, IMAGES * ranks)
    cells = {cell.name: cell for cell in account.cells}
    passes, whole, largest = 0.0, Bill(), 0.0
    for call in account.parts.passes[0][0].calls:
        cell, seen = cells[call.name], account.parts.seen[call.name]
        passes += price(call.passes.forward) + price(call.passes.weights)
        passes += 0.0 if call.first else price(call.passes.inputs)
        measuring = sum(price(cell.curvature.measure_work(call.layer, k, call.x, call.y, ranks)) for k in cell.keys)
        for everyone, stage in ((measuring, 0), (0.0, 1)):  # taking in is measuring's, then factoring
            alone = Bill()
            for key in cell.keys:
                work = price(holder_work(cell, key, seen)[stage])
                for bill in (whole, alone):
                    bill.add(Item(cell, (key,), 0.0, 0.0, {cell.holders[key]: work}))
            for bill in (whole, alone):
                bill.everyone += everyone
            largest = max(largest, alone.total)
    every, piece = 1 + whole.total / passes, largest / passes
    same = {"piece": piece, "measuring": None, "refreshed": None, "train_loss": None, "loss": None, "accuracy": None}
    return [
        {"rule": "Every(1)", "longest": every, "mean": every, **same},
        {"rule": f"Budget({SHARE})", "longest": 1 + max(SHARE, piece), "mean": None, **same},
    ]


def measure(case: Case, data: str) -> list[dict[str, Any]]:
    """A row a rule, means over seeds."""
    task = find_task(case.task)
    task = task.located(data) if case.task.startswith("cifar") else task
    splits, rows = learning(task, task.recipe.data.load(), final=False), []
    for name, settings in RULES.items():
        count = case.steps if case.fixed is None or settings.refresh is None else case.fixed
        if count < 3 and settings.refresh != 1:
            continue  # an interval's second measurement is not reached: see Every(1)
        runs = [run(task, splits, case, settings, count, seed) for seed in case.seeds]
        means = {key: None if runs[0][key] is None else fmean(one[key] for one in runs) for key in runs[0]}
        rows.append({"rule": name, **means, "longest": max(one["longest"] for one in runs)})
        print(case.title, rows[-1], flush=True)
    return rows


HEAD = (
    "rule",
    "longest step",
    "mean step",
    "steps that measure",
    "statistics a step",
    "last training loss",
    "held-out loss",
    "accuracy",
)


COLUMNS = (
    ("longest", ".2f"),
    ("mean", ".3f"),
    ("measuring", ".0%"),
    ("refreshed", ".1%"),
    ("train_loss", ".3f"),
    ("loss", ".3f"),
    ("accuracy", ".1%"),
)


def shown(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)


def table(content: dict[str, Any]) -> str:
    lines = []
    for case in content["cases"]:
        piece = max(row["piece"] for row in case["rows"])
        seeds = f"seeds {' '.join(map(str, case['seeds']))}" if case["seeds"] else "by the planner"
        lines += [
            f"\n{case['title']} ({seeds}; the largest piece of work is {piece:.2f} steps):\n",
            f"| {' | '.join(HEAD)} |",
            f"| {' | '.join(['---', *['---:'] * (len(HEAD) - 1)])} |",
        ]
        for r in case["rows"]:
            lines.append(f"| {' | '.join([r['rule'], *(shown(r[name], how) for name, how in COLUMNS)])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/cifar100", help="folder of CIFAR-100's parquet files")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print the tables of the results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.show:
        record = Record(given.out, "cpu")
        for case in CASES:
            told = {"title": case.title, **asdict(case), "seeds": list(case.seeds)}
            if record.find(told) is None:
                record.add(told, measure(case, given.data))
        for ranks in RANKS:
            told = {"title": f"ResNet-50, {IMAGES} images of 224x224 a rank, {ranks:,} ranks", "seeds": []}
            if record.find(told) is None:
                record.add(told, planned(ranks))
    print(table(read(given.out)))


if __name__ == "__main__":
    main()
