"""What a step costs the host: operations that are issued, times the device is waited for, and milliseconds.

    python benchmarks/host.py           (a quarter of an hour on one quiet core; stopped, it goes on)
    python benchmarks/host.py --show    (the tables of the committed results)

On a GPU a step cannot be faster than the host issues its operations. The networks have the layers of ResNet-50, of a
transformer of 12 blocks and of a perceptron of 100 layers, so narrow that on one CPU thread next to nothing but the
issuing is left. A row is what natgrad does in `step()` and, where it measures, in its hooks: what the forward and
backward passes do without it is taken off. The clock is the thread's own, which stands still while other processes have
the core. Rounds are interleaved with SGD(foreach) and AdamW(foreach): the column of ratios is the median of a round's
time over AdamW's in the same round.

A second table says which part of a step issues the operations: each is laid to the innermost function of natgrad that
PARTS names. Its column `least` is what the computation needs as it is defined, with one operation for each product, sum
and copy that cannot be left out and nothing joined over layers that the passes visit one after the other.

Operations are those that torch dispatches (a `_foreach_` call is one). A wait is a time that the host asks a device for
values and stands still until all before it is done; waits are counted with the network on the meta device.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from record import Record, read
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import natgrad
from natgrad.capture import EVERY
from natgrad_lab.models import ImageResNet, Mlp, Transformer
from natgrad_lab.plan.simulated import Device, is_view

RESULTS = Path(__file__).parent / "results" / "host-cpu.json"
NEVER = 10**9
PARTED = ("SPNGD, all stale", "SENG, measuring")  # steps whose parts are shown


@dataclass(frozen=True)
class Net:
    """A narrow network, and how to make a batch for it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]


NETS = {
    "ResNet-50": Net(lambda: ImageResNet(50, width=4).build((3, 32, 32), 10), lambda: torch.randn(8, 3, 32, 32)),
    "transformer of 12 blocks": Net(
        lambda: Transformer(blocks=12, width=16).build((1, 1, 8), 32), lambda: torch.randint(0, 32, (8, 8))
    ),
    "MLP of 100 layers": Net(lambda: Mlp((16,) * 99).build((1, 4, 4), 10), lambda: torch.randn(8, 1, 4, 4)),
}
CONTENDERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD(foreach)": lambda m: torch.optim.SGD(m.parameters(), 1e-3, momentum=0.9, foreach=True),
    "AdamW(foreach)": lambda m: torch.optim.AdamW(m.parameters(), 1e-3, foreach=True),
    "SPNGD, nothing stale": lambda m: natgrad.SPNGD(m, 1e-3, refresh=NEVER),
    "SPNGD, all stale": lambda m: natgrad.SPNGD(m, 1e-3, refresh=1),
    "KFAC, nothing stale": lambda m: natgrad.KFAC(m, 1e-3, refresh=NEVER),
    "KFAC, all stale": lambda m: natgrad.KFAC(m, 1e-3, refresh=1),
    "SENG, between": lambda m: natgrad.SENG(m, 1e-3, refresh=NEVER),
    "SENG, measuring": lambda m: natgrad.SENG(m, 1e-3, refresh=1),
    "NLCG": lambda m: natgrad.NLCG(m, 1e-3),
}


class Part(NamedTuple):
    """A part of a step: the functions that make it, by file (and name), and the least operations for each of `items`.

    items: the layers that have one of these statistics; "sizes": the matrices of unlike sizes; "layers": all that are
    measured; "": the step.
    """

    title: str
    functions: tuple[str, ...]
    items: str
    least: int


PARTS = (
    Part("A: rows in order, their product", ("kronecker.before",), "A", 2),
    Part("G: a product for each sample, their sum", ("kronecker.after",), "G", 2),
    Part("F: dy x, its sum and that of dy", ("unitwise.before", "unitwise.after", "unitwise.close_all"), "F", 3),
    Part(
        "rows of samples: of inputs, of gradients, their products",
        ("per_sample.before", "per_sample.after", "capture._stacked", "sample_rows", "layer_state.keep_rows"),
        "U",
        3,
    ),
    Part("checksums: both sides, for one layer in eight", ("checksum",), "layers", 1),
    Part(
        "inverses: copy, damping, factor, its check, inverse",
        ("inversion", "curvature_engine.factor"),
        "sizes",
        5,
    ),
    Part("means and changes of statistics", ("averages", "curvature_engine.refresh", "curvature_engine.settle"), "", 0),
    Part("hooks, beside these", ("capture", "hooks"), "", 0),
    Part("gradients, directions, lengths, weights", ("second_order.step", "second_order.zero_grad"), "", 0),
)


TITLES = {name: part.title for part in PARTS for name in part.functions}


@cache
def title_of(file: str, function: str) -> str | None:
    """The part that a function makes."""
    path = Path(file)
    if "natgrad" not in path.parts:
        return None
    return TITLES.get(f"{path.stem}.{function}") or TITLES.get(path.stem)


def part_of(frame: FrameType | None) -> str | None:
    """The title of the part that a stack of calls is in, the innermost one; None outside of natgrad."""
    while frame is not None:
        if (title := title_of(frame.f_code.co_filename, frame.f_code.co_name)) is not None:
            return title
        frame = frame.f_back
    return None


def items_of(optimizer: torch.optim.Optimizer) -> Counter[str]:
    """How many layers have each statistic, how many are measured, and how many sizes of matrices are inverted."""
    found, sizes = Counter[str](), set[Any]()
    for cell in getattr(optimizer, "cells", ()):
        found["layers"] += bool(cell.statistics)
        for moment in cell.statistics:
            found[moment.key] += 1
            shape = () if moment.key == "U" else moment.shape(cell.layer)[1:]
            sizes.add((moment.key, shape))
    found["sizes"] = len(sizes)
    return found


class Counted(TorchDispatchMode):
    """Counts operations, and those of each part of natgrad's steps."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.parts = 0, Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_view(function):
            self.operations += 1
            if (title := part_of(sys._getframe(1))) is not None:
                self.parts[title] += 1
        return function(*args, **(kwargs or {}))


def waits(net: Net, build: Callable[[nn.Module], torch.optim.Optimizer], warm: int = 3) -> int:
    """How often one step, hooks included, waits for the device, after some steps."""
    torch.manual_seed(0)
    with warnings.catch_warnings(), Device() as device:
        warnings.simplefilter("ignore")  # on meta tensors nothing is seen of the loss
        contender = Contender(net, build, "meta")
        x = net.inputs().to("meta")
        for _ in range(warm):
            contender.finish(contender.descend(x))
        before = device.reads
        contender.finish(contender.descend(x))
        return device.reads - before


class Contender:
    """A model with its optimizer, which takes steps."""

    def __init__(self, net: Net, build: Callable[[nn.Module], torch.optim.Optimizer], device: str = "cpu"):
        torch.manual_seed(0)
        self.model = net.build().to(device)
        self.optimizer = build(self.model)
        if (engine := getattr(self.optimizer, "engine", None)) is not None:
            engine.count_with(time.thread_time)

    def step(self, x: Tensor) -> float:
        """One step: seconds within `step()`, and in natgrad's hooks."""
        before = sum(self.spent().values())
        loss, clock = self.descend(x), time.thread_time()
        self.finish(loss)
        clock = time.thread_time() - clock
        inside = sum(self.spent().values()) - before
        hooks = sum(self.spent().get(name, 0.0) for name in ("measure", "checksum")) - self.seen
        self.seen += hooks
        return clock + (hooks if inside else 0.0)

    seen = 0.0

    def spent(self) -> dict[str, float]:
        return getattr(self.optimizer, "seconds", {})

    def descend(self, x: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.model(x).square().mean()
        loss.backward()
        return loss.detach()

    def finish(self, loss: Tensor) -> None:
        if isinstance(self.optimizer, natgrad.NLCG) and self.optimizer.search.feedback is not None:
            self.optimizer.step(loss=loss)
        else:
            self.optimizer.step()

    def counted(self, x: Tensor, passes: int) -> tuple[int, list[dict[str, Any]]]:
        """Operations of a step, and those of each part; the mean over as many steps as checksums take turns.

        passes: operations of the bare passes.
        """
        with Counted() as counted:
            for _ in range(EVERY):
                self.finish(self.descend(x))
        items, parts = items_of(self.optimizer), []
        for part in PARTS:
            own = round(counted.parts[part.title] / EVERY)
            times = items[part.items] if part.items else 1
            if own:
                parts.append(
                    {
                        "part": part.title,
                        "of": times,
                        "operations": own,
                        "least": part.least * times if part.least else own,
                    }
                )
        return round(counted.operations / EVERY) - passes, parts


def bare_passes(net: Net, x: Tensor) -> int:
    """Operations of zero_grad and the two passes without an optimizer of ours."""
    contender = Contender(net, CONTENDERS["SGD(foreach)"])
    contender.descend(x)
    with Counted() as counted:
        contender.descend(x)
    return counted.operations


def measure(net: Net, rounds: int) -> list[dict[str, Any]]:
    """A row a contender. Three steps warm up: the first measures in every case."""
    torch.manual_seed(1)
    x, built = net.inputs(), {name: Contender(net, build) for name, build in CONTENDERS.items()}
    passes = bare_passes(net, x)
    counts, parts = {}, {}
    for name, contender in built.items():
        for _ in range(12):  # later measurements have fewer checksums
            contender.step(x)
        counts[name], parts[name] = contender.counted(x, passes)
    seconds: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(rounds):
        for name, contender in built.items():
            seconds[name].append(contender.step(x))
    base = seconds["AdamW(foreach)"]
    return [
        {
            "optimizer": name,
            "operations": counts[name],
            "waits": waits(net, CONTENDERS[name]),
            "ms": round(1e3 * statistics.median(seconds[name]), 3),
            "ratio": round(statistics.median(a / b for a, b in zip(seconds[name], base)), 3),
            **({"parts": parts[name]} if parts[name] else {}),
        }
        for name in built
    ]


def table(content: dict[str, Any]) -> str:
    lines = []
    for case in content["cases"]:
        lines += [
            f"\nThe layers of {case['case']}:\n",
            "| a step | operations | waits | ms | over AdamW(foreach) |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for r in case["rows"]:
            lines.append(
                f"| {r['optimizer']} | {r['operations']:,} | {r['waits']} | {r['ms']:.1f} | {r['ratio']:.2f} |"
            )
    return "\n".join([*lines, *parts_table(content["cases"][0])])


def parts_table(case: dict[str, Any]) -> list[str]:
    """Where the operations of steps that measure go."""
    lines = []
    for row in case["rows"]:
        if row["optimizer"] not in PARTED or "parts" not in row:
            continue
        least = sum(part["least"] for part in row["parts"])
        lines += [
            f"\n{row['optimizer']}, the layers of {case['case']}, by part:\n",
            "| part | times | operations | least |",
            "| --- | ---: | ---: | ---: |",
            *(f"| {p['part']} | {p['of']} | {p['operations']:,} | {p['least']:,} |" for p in row["parts"]),
            f"| all | | {sum(p['operations'] for p in row['parts']):,} | {least:,} |",
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--profile", help="show where the time of this contender's step goes, on the first network")
    parser.add_argument("--show", action="store_true", help="print the tables of the results")
    told = parser.parse_args()
    torch.set_num_threads(1)
    if told.profile:
        return profile(told.profile)
    if not told.show:
        record = Record(told.out, "cpu")
        for name, net in NETS.items():
            case = {"case": name, "rounds": told.rounds, "threads": 1}
            if record.find(case) is None:
                record.add(case, measure(net, told.rounds))
    return print(table(read(told.out)))


def profile(name: str) -> None:
    """Print the operations of one step by how often they are issued, and python's functions by time."""
    import cProfile
    import pstats

    net = next(iter(NETS.values()))
    contender, x = Contender(net, CONTENDERS[name]), net.inputs()
    for _ in range(12):
        contender.step(x)
    names: Counter[str] = Counter()

    class Named(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not is_view(function):
                names[function.overloadpacket.__name__] += 1
            return function(*args, **(kwargs or {}))

    loss = contender.descend(x)
    with Named() if names is not None else nullcontext():
        contender.finish(loss)
    print(names.most_common(40))
    profiler = cProfile.Profile()
    for _ in range(20):
        loss = contender.descend(x)
        profiler.enable()
        contender.finish(loss)
        profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
