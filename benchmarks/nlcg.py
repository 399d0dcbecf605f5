"""NLCG beside SGD, Adam and K-FAC on digits in batches of a quarter of the data, at equal tuning budgets.

    python benchmarks/nlcg.py            # all four tasks, a quarter of an hour on one core
    python benchmarks/nlcg.py --task mlp

Every tuned method tries ten learning rates, a factor of two apart, on two seeds (four on the networks that run in a
tenth of a second); the one with the least median train loss is run on fresh seeds. Methods with the curvature step try
none. Two schedules: the authors' (a root-shaped warm-up over an eighth, a tenth from 51 %, a hundredth from 76.5 %) and
a constant rate. A trial that diverges counts as infinite. BatchNorm's statistics are estimated anew on the training
images before a model is judged.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import Record
from torch import nn
from torch.nn.functional import cross_entropy

import natgrad
from natgrad.parallel import World
from natgrad_lab.data import Digits, Splits
from natgrad_lab.models import CifarResNet, Mlp
from natgrad_lab.schedules import Constant, Piecewise, RootWarmUp
from natgrad_lab.train.evaluate import estimate_norms, evaluate

SCHEDULES = {
    "authors": RootWarmUp(Piecewise((0.51, 0.765), (1.0, 0.1, 0.01)), length=0.125, start=0.001),
    "constant": Constant(),
}
MEASURED: dict[str, Any] = {"damping": 1e-2, "rows_per_dim": None, "ema_decay": 0.9, "fisher": "sampled"}
BLOCKS = {"curvature": natgrad.spngd_blocks, **MEASURED}
KRONECKER = {"preconditioner": natgrad.spngd_blocks, **MEASURED}
Build = Callable[[nn.Module, float], torch.optim.Optimizer]


@dataclass(frozen=True)
class Method:
    """How to build an optimizer, and the ten learning rates 2^low ... 2^(low + 9); none: it is not tuned."""

    build: Build
    low: int | None = -7

    def rates(self) -> list[float]:
        return [1.0] if self.low is None else [2.0**k for k in range(self.low, self.low + 10)]


def sgd(nesterov: bool) -> Method:
    return Method(lambda model, lr: torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=nesterov))


def nlcg(low: int | None = -7, **options: Any) -> Method:
    return Method(lambda model, lr: natgrad.NLCG(model, lr, **options), low)


def curved(beta: Any, **options: Any) -> Method:
    return nlcg(None, beta=beta, step=natgrad.CurvatureStep(), **options)


METHODS = {
    "SGD-M .9": sgd(False),
    "NAG .9": sgd(True),
    "Adam": Method(lambda model, lr: torch.optim.Adam(model.parameters(), lr), -13),
    "NLCG faithful": nlcg(mode="faithful"),
    "NLCG hardened": nlcg(),
    "NLCG identity": nlcg(preconditioner=None),
    "NLCG second moment": nlcg(-13, preconditioner=natgrad.SecondMoment()),
    "NLCG DY": nlcg(beta=natgrad.optim.dai_yuan),
    "constant .9 + diagonal BFGS": nlcg(beta=lambda products: 0.9, step=natgrad.Scheduled(feedback=None)),
    "K-FAC + momentum .9": Method(
        lambda model, lr: natgrad.KFAC(model, lr, momentum=0.9, refresh=1, length=natgrad.plain, **BLOCKS), -9
    ),
    "NLCG FR + K-FAC": nlcg(-9, **KRONECKER),
    "NLCG FR, curvature step": curved(natgrad.optim.fletcher_reeves),
    "NLCG PR, curvature step": curved(natgrad.optim.polak_ribiere),
    "NLCG PR + K-FAC, curvature step": curved(natgrad.optim.polak_ribiere, **KRONECKER),
}


@dataclass(frozen=True)
class TorchMlp:
    """Two hidden layers of 100 as torch draws them: smaller weights than He's."""

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        inputs = math.prod(shape)
        hidden = (nn.Linear(inputs, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU())
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(100, classes))


@dataclass(frozen=True)
class Task:
    """A network with its batch, steps and fresh seeds, and which methods are tried."""

    model: Any
    batch: int
    steps: int
    fresh: tuple[int, ...]
    methods: tuple[str, ...]
    sweep: tuple[int, ...] = (100, 101)
    schedules: tuple[str, ...] = tuple(SCHEDULES)


TASKS = {
    "mlp": Task(TorchMlp(), 359, 40, tuple(range(20)), tuple(METHODS), (100, 101, 102, 103)),
    "mlp, He's weights": Task(Mlp((100, 100)), 359, 40, tuple(range(20)), tuple(METHODS), (100, 101, 102, 103)),
    "resnet": Task(
        CifarResNet(depth=8, widths=(6, 12, 21)),
        359,
        40,
        (0, 1, 2, 3),
        (
            "SGD-M .9",
            "Adam",
            "NLCG faithful",
            "NLCG hardened",
            "NLCG identity",
            "K-FAC + momentum .9",
            "NLCG PR, curvature step",
            "NLCG PR + K-FAC, curvature step",
        ),
    ),
    "small batch": Task(
        TorchMlp(),
        44,
        320,
        (0, 1, 2, 3, 4),
        ("SGD-M .9", "Adam", "NLCG faithful", "NLCG hardened", "NLCG identity"),
        schedules=("constant",),
    ),
}


def trial(task: Task, method: Method, schedule: str, lr: float, seed: int, splits: Splits) -> dict[str, float]:
    """One run: the loss on all training images and the accuracy on the test, in per cent."""
    torch.manual_seed(seed)
    model = task.model.build((1, 8, 8), 10)
    optimizer = method.build(model, lr)
    order = batches(task, len(splits.train), seed)
    for step, index in enumerate(order):
        rate = lr if method.low is None else lr * SCHEDULES[schedule](step / task.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if not descend(model, optimizer, *splits.train.batch(index)):
            return {"loss": math.inf, "accuracy": 10.0}
    estimate_norms(model, splits.train, World())
    loss, accuracy = evaluate(model, splits.train, World()).loss, evaluate(model, splits.test, World()).accuracy
    return {"loss": loss if math.isfinite(loss) else math.inf, "accuracy": 100 * accuracy}


def batches(task: Task, count: int, seed: int) -> list[torch.Tensor]:
    """The places of each step's images: shuffled anew every epoch, the rest of an epoch left out."""
    generator, found = torch.Generator().manual_seed(seed), []
    while len(found) < task.steps:
        places = torch.randperm(count, generator=generator)
        found += [part for part in places.split(task.batch) if len(part) == task.batch]
    return found[: task.steps]


def descend(model: nn.Module, optimizer: Any, x: torch.Tensor, y: torch.Tensor) -> bool:
    """One step; whether the loss is still a number."""
    output = model(x)
    loss = cross_entropy(output, y)
    if getattr(getattr(optimizer, "engine", None), "sampled", False):
        optimizer.sample(output)
    loss.backward()
    if not isinstance(optimizer, natgrad.NLCG):
        optimizer.step()
    elif isinstance(optimizer.search, natgrad.CurvatureStep):
        optimizer.step(forward=lambda: model(x))
    elif optimizer.search.feedback is None:
        optimizer.step()
    else:
        optimizer.step(loss=loss)
    optimizer.zero_grad()
    return bool(torch.isfinite(loss)) and loss.item() < 1e4


def study(task: Task, method: Method, schedule: str, splits: Splits) -> list[dict[str, Any]]:
    """Choose the learning rate on the seeds of the sweep, then run the fresh ones."""
    losses = {
        lr: statistics.median(trial(task, method, schedule, lr, seed, splits)["loss"] for seed in task.sweep)
        for lr in (method.rates() if method.low is not None else [])
    }
    picked = min(losses, key=lambda lr: losses[lr]) if losses else 1.0
    fresh = [{"seed": seed, **trial(task, method, schedule, picked, seed, splits)} for seed in task.fresh]
    sweep = {f"{lr:g}": told(loss) for lr, loss in losses.items()}
    fresh = [{**run, "loss": told(run["loss"])} for run in fresh]
    return [{"lr": picked, "tuned": bool(losses), "sweep": sweep, "fresh": fresh}]


def told(loss: float) -> float | str:
    """A loss as strict JSON has it, which knows no infinity."""
    return round(loss, 8) if math.isfinite(loss) else "inf"


def cases(name: str) -> list[dict[str, str]]:
    """Every method under every schedule; what takes no learning rate once."""
    task = TASKS[name]
    return [
        {"task": name, "method": method, "schedule": schedule}
        for method in task.methods
        for schedule in task.schedules
        if METHODS[method].low is not None or schedule == "constant"
    ]


def slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def line(case: dict[str, str], row: dict[str, Any]) -> str:
    """A row of the table: median loss with its range, mean accuracy."""
    losses = sorted(float(run["loss"]) for run in row["fresh"])
    accuracy = statistics.fmean(run["accuracy"] for run in row["fresh"])
    rate = f"{row['lr']:.3g}" if row["tuned"] else "-"
    middle = f"{statistics.median(losses):.4f} [{losses[0]:.4f}, {losses[-1]:.4f}]"
    return f"| {case['task']} | {case['schedule']} | {case['method']} | {rate} | {middle} | {accuracy:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, action="append", help="all of them by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    splits = Digits().load()
    print("| task | schedule | method | lr | train loss, median [range] | test accuracy, % |\n" + "| --- " * 6 + "|")
    for name in options.task or TASKS:
        record = Record(options.out / f"nlcg-{slug(name)}.json", "cpu")
        for case in cases(name):
            rows = record.find(case)
            if rows is None:
                rows = study(TASKS[name], METHODS[case["method"]], case["schedule"], splits)
                record.add(case, rows)
            print(line(case, rows[0]), flush=True)


if __name__ == "__main__":
    main()
