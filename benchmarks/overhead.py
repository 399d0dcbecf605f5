"""What a step costs beside SGD's, as ratios in one interleaved run.

    python benchmarks/overhead.py --profile cpu --images data/cifar100  (10 minutes; stopped, it goes on)
    python benchmarks/overhead.py --depth 32 --batch 512 --rounds 9 --no-channels-last

Machines are shared and noisy, so nothing is compared across runs: in every round each contender takes one step, in
shuffled order, and the table gives medians over rounds:

    inside  1 + (seconds inside natgrad) / (SGD's step): steadier, as forward and backward passes cancel
    whole   the whole step over SGD's, in wall and in CPU time
    check   the share of a measuring step that its checksums take (natgrad/checksum.py)

On one CPU thread `inside` and `check` are seconds of the thread, over those of SGD's step: the thread's clock stands
still while other processes have the core.

The row of default steps is a run from the first step on, in blocks between blocks of SGD, and gives the mean step and
the share of all statistics that were measured in a step. How often that is depends on what is learnt: patterns stand
in for images, and `--images` takes CIFAR-100 from a folder of parquet files instead.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from batches import CLASSES, Data, layout
from record import Record
from torch import Tensor
from torch.nn.functional import cross_entropy

import natgrad
from natgrad.optim import SecondOrder
from natgrad_lab.models import CifarResNet

NEVER = 10**9
BLOCK = 20  # default steps between two blocks of SGD


@dataclass(frozen=True)
class Case:
    """One shape to be measured. `steps`: the length of the run with default settings, 0 for none."""

    depth: int = 20
    batch: int = 128
    rounds: int = 9
    steps: int = 0
    threads: int = 1
    device: str = "cpu"
    channels_last: bool = True
    seed: int = 0
    images: str = ""


PROFILES = {
    "cpu": [
        Case(20, 128, 9, 200, channels_last=True),
        Case(20, 128, 9, 0, channels_last=False),
        Case(32, 128, 9, 0, channels_last=True),
        Case(20, 1024, 3, 0, channels_last=True),
    ],
    "cuda": [
        Case(depth, batch, 30, steps, device="cuda", channels_last=last)
        for batch, steps in ((128, 200), (1024, 0))
        for depth in (20, 32)
        for last in (True, False)
    ],
}


class Spent(NamedTuple):
    """Seconds of one step: on the clock, of the processor, inside natgrad, and of that in checksums.

    The last two are of the processor on one CPU thread, else on the clock.
    """

    wall: float
    cpu: float
    inside: float
    check: float = 0.0


class Row(NamedTuple):
    """One line of the table: milliseconds, ratios to SGD, the share of the statistics measured in a step."""

    name: str
    wall: float
    within: float
    inside: float
    whole: float
    whole_cpu: float
    measured: float | None = None
    state: int | None = None  # bytes of the optimizer's state on the one rank
    check: float | None = None  # the share of the step that checksums take


class Contender:
    """A model and its optimizer, built alike for all."""

    def __init__(self, case: Case, build: Callable[[torch.nn.Module], torch.optim.Optimizer]):
        torch.manual_seed(case.seed)
        model = CifarResNet(depth=case.depth).build((3, 32, 32), CLASSES)
        self.model = model.to(torch.device(case.device), memory_format=layout(case))  # type: ignore[call-overload]
        self.optimizer = build(self.model)
        if of_thread(case) and isinstance(self.optimizer, SecondOrder):
            self.optimizer.engine.count_with(time.thread_time)

    def step(self, images: Tensor, labels: Tensor) -> Spent:
        """Take one step."""
        before, checked = self.inside(), self.checks()
        wait(images)
        wall, cpu = time.perf_counter(), time.process_time()
        self.optimizer.zero_grad()
        self.optimizer.step(lambda: self.loss(images, labels))  # which NLCG wants to know
        wait(images)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return Spent(wall, cpu, self.inside() - before, self.checks() - checked)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        value = cross_entropy(self.model(images), labels)
        value.backward()
        return value

    def inside(self) -> float:
        return sum(getattr(self.optimizer, "seconds", {}).values())

    def checks(self) -> float:
        return getattr(self.optimizer, "seconds", {}).get("checksum", 0.0)

    def state(self) -> int:
        """Bytes of the optimizer's tensors."""
        tensors = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


def of_thread(case: Case) -> bool:
    """Whether the seconds inside natgrad are those of a thread that does everything."""
    return case.device == "cpu" and case.threads == 1


def wait(x: Tensor) -> None:
    if x.is_cuda:  # its work is asynchronous
        torch.cuda.synchronize()


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)


def spngd(**options) -> Callable[[torch.nn.Module], torch.optim.Optimizer]:
    return lambda model: natgrad.SPNGD(model, lr=0.003, **options)  # with 0.02 ResNet-20 leaves CIFAR-100 for good


def seng(**options) -> Callable[[torch.nn.Module], torch.optim.Optimizer]:
    return lambda model: natgrad.SENG(model, lr=0.05, **options)


CONTENDERS = {
    "SGD": sgd,
    "nothing stale": spngd(refresh=NEVER),
    "all stale": spngd(refresh=1),
    "all stale, every row": spngd(refresh=1, rows_per_dim=None),
    "SENG, between": seng(refresh=NEVER),
    "SENG, measuring": seng(refresh=1),
    "NLCG": lambda model: natgrad.NLCG(model, lr=0.01),
    "NLCG, faithful": lambda model: natgrad.NLCG(model, lr=0.01, mode="faithful"),
}


def compare(case: Case) -> list[Row]:
    """One step of each in every round, in shuffled order, after two rounds that warm up."""
    built = {name: Contender(case, build) for name, build in CONTENDERS.items()}
    spent: dict[str, list[Spent]] = {name: [] for name in built}
    data, order, shuffle = Data(case), list(built), random.Random(case.seed)
    for turn in range(case.rounds + 2):
        batch = data()
        shuffle.shuffle(order)
        for name in order:
            taken = built[name].step(*batch)
            if turn >= 2:
                spent[name].append(taken)
    middle = {name: Spent(*map(statistics.median, zip(*taken))) for name, taken in spent.items()}
    rows = [row(name, taken, middle["SGD"], of_thread(case)) for name, taken in middle.items()]
    return [r._replace(state=built[r.name].state()) for r in rows]


def run_default(case: Case) -> Row:
    """The mean step of a run with default settings, from its first step, against SGD's in blocks between."""
    ours, theirs, data = Contender(case, spngd()), Contender(case, sgd), Data(case)
    theirs.step(*data())
    spent: list[Spent] = []
    base: list[Spent] = []
    shares: list[float] = []
    while len(spent) < case.steps:
        base += [theirs.step(*data()) for _ in range(BLOCK // 4)]
        for _ in range(min(BLOCK, case.steps - len(spent))):
            spent.append(ours.step(*data()))
            shares.append(getattr(ours.optimizer, "refreshed", 0.0))
    mean, of_sgd = (Spent(*map(statistics.fmean, zip(*taken))) for taken in (spent, base))
    return row(f"{case.steps} default steps", mean, of_sgd, of_thread(case))._replace(measured=statistics.fmean(shares))


def row(name: str, taken: Spent, base: Spent, of_thread: bool) -> Row:
    """A line of the table; `of_thread`: what is inside natgrad was counted in seconds of the processor."""
    return Row(
        name,
        wall=1e3 * taken.wall,
        within=1e3 * taken.inside,
        inside=1 + taken.inside / (base.cpu if of_thread else base.wall),
        whole=taken.wall / base.wall,
        whole_cpu=taken.cpu / base.cpu,
        check=taken.check / (taken.cpu if of_thread else taken.wall),
    )


def measure(case: Case) -> list[Row]:
    """The table of one case."""
    torch.set_num_threads(case.threads)
    rows = compare(case)
    return [*rows, run_default(case)] if case.steps else rows


def images_of(case: Case) -> str:
    return "CIFAR-100" if case.images else "patterns"


def show(case: Case, rows: list[Row]) -> None:
    shape = f"channels {'last' if case.channels_last else 'first'}, {images_of(case)}"
    print(f"\nResNet-{case.depth}, batch {case.batch}, {case.device}, {case.threads} thread(s), {shape}")
    head = f"{'':24}{'ms':>9}{'inside ms':>11}{'1+inside/SGD':>14}{'whole':>8}{'whole CPU':>11}"
    print(f"{head}{'check':>8}{'state':>14}")
    for r in rows:
        share = "" if r.measured is None else f"   {r.measured:.1%} measured a step"
        share += "" if r.state is None else f"{r.state / 2**20:10.1f} MiB"
        check = "" if r.check is None else f"{r.check:8.1%}"
        numbers = f"{r.wall:9.1f}{r.within:11.1f}{r.inside:14.3f}{r.whole:8.3f}{r.whole_cpu:11.3f}{check}"
        print(f"{r.name:24}{numbers}{share}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=PROFILES, help="a table of cases, instead of the one below")
    for name, default in asdict(Case()).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(default, bool):
            parser.add_argument(flag, default=default, action=argparse.BooleanOptionalAction)
        else:
            parser.add_argument(flag, default=default, type=type(default))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = vars(parser.parse_args())
    profile, out = options.pop("profile"), options.pop("out")
    cases = [Case(**options)]
    if profile:
        if replace(cases[0], images="") != Case():
            parser.error(f"--profile {profile} says what is measured; beside it only --images and --out")
        cases = [replace(case, images=cases[0].images) for case in PROFILES[profile]]
    name = profile or f"resnet{cases[0].depth}-{cases[0].batch}-{cases[0].device}"
    record = Record(out / f"overhead-{name}.json", cases[0].device)
    for case in cases:
        told = {**asdict(case), "images": images_of(case)}
        rows = [Row(**r) for r in record.find(told) or []]
        if not rows:
            rows = measure(case)
            record.add(told, [r._asdict() for r in rows])
        show(case, rows)


if __name__ == "__main__":
    main()
