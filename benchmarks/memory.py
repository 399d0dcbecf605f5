"""What an optimizer keeps beside the weights: MiB of state on the ranks that share a network, without running it.

    python benchmarks/memory.py           (two minutes; everything is on meta tensors)
    python benchmarks/memory.py --show    (the tables of the committed results)

natgrad's optimizers are built on ranks that are not there, and every tensor of their state is counted at the rank that
holds it. SENG's rows, which have the shape of the data, are those of its samples. Other optimizers take a step on meta
tensors; they are data-parallel as they come, so that every rank holds everything. `squares` is what SP-NGD and K-FAC
held before symmetric matrices were packed: a statistic, its value before and its inverse as three squares in single
precision, and the last direction of parameters without curvature.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import Record, read
from torch import Tensor, nn

import natgrad
from natgrad.curvature.curvature import Extent
from natgrad.optim import SecondOrder
from natgrad.parallel import World
from natgrad_lab.models import CifarResNet, ImageResNet, Transformer
from natgrad_lab.train.optimizers import AdamW, Muon, Sgd, Soap

RESULTS = Path(__file__).parent / "results" / "memory.json"
RANKS = (1, 8, 64)
OTHERS = {"SGD, momentum": Sgd(), "AdamW": AdamW(), "Muon": Muon(), "SOAP": Soap()}
OURS: dict[str, Callable[..., SecondOrder]] = {
    "SP-NGD": natgrad.SPNGD,
    "K-FAC": natgrad.KFAC,
    "SENG": natgrad.SENG,
    "NLCG": natgrad.NLCG,
}
PACKED = ("SP-NGD", "K-FAC")


@dataclass(frozen=True)
class Net:
    """A network on the meta device, and one sample for it."""

    build: Callable[[], nn.Module]
    sample: Callable[[], Tensor]


def transformer(tied: bool) -> Net:
    """Twelve blocks of width 768 over 1,024 places and 50,257 words, as GPT-2 small has them."""
    shape = Transformer(blocks=12, width=768, heads=12, tied=tied)
    return Net(lambda: shape.build((1, 1, 1024), 50257), lambda: torch.zeros(1, 1024, dtype=torch.long, device="meta"))


NETS = {
    "ResNet-20": Net(lambda: CifarResNet(20).build((3, 32, 32), 100), lambda: torch.zeros(1, 3, 32, 32, device="meta")),
    "ResNet-50": Net(
        lambda: ImageResNet(50).build((3, 224, 224), 1000), lambda: torch.zeros(1, 3, 224, 224, device="meta")
    ),
    "GPT-2 small": transformer(tied=True),
    "GPT-2 small with a head of its own": transformer(tied=False),
}


class Silent:
    """The last of so many ranks. The others say nothing."""

    def __init__(self, size: int):
        self.size, self.rank = size, size - 1

    def all_reduce(self, buffer: Tensor, op: str = "sum") -> Tensor:
        return buffer

    def all_gather(self, chunk: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        return [chunk if n == len(chunk) else chunk.new_empty(n) for n in lengths]


def on_meta(net: Net) -> nn.Module:
    with torch.device("meta"):
        return net.build()


def size_of(value: Any) -> int:
    """Bytes of a tensor."""
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def of_others(optimizer: torch.optim.Optimizer, model: nn.Module) -> int:
    """Bytes of an optimizer's state after its first step."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return sum(size_of(value) for state in optimizer.state.values() for value in values_of(state))


def values_of(state: Any) -> list[Any]:
    """Tensors in dictionaries and lists."""
    if isinstance(state, dict):
        state = list(state.values())
    return [v for own in state for v in values_of(own)] if isinstance(state, list) else [state]


def places(optimizer: SecondOrder, model: nn.Module, sample: Tensor) -> dict[str, int]:
    """How many places a sample has in each layer."""
    found: dict[str, int] = {}
    hooks = [
        cell.layer.module.register_forward_pre_hook(
            lambda module, args, cell=cell: found.update({cell.name: cell.layer.count(args[0])[1]})
        )
        for cell in optimizer.cells
        if cell.statistics
    ]
    model(sample)
    for hook in hooks:
        hook.remove()
    return found


def of_ours(optimizer: SecondOrder, model: nn.Module, sample: Tensor) -> list[Counter[str]]:
    """For every rank the bytes of its state by name."""
    optimizer.engine.capture.disarm()
    world = optimizer.world
    seen = places(optimizer, model, sample) if any(cell.by_rows for cell in optimizer.cells) else {}
    found: list[Counter[str]] = [Counter() for _ in range(world.size)]
    for cell in optimizer.cells:
        elsewhere = optimizer.fresh_state(cell, -1)
        holders = {cell.owner, *cell.holders.values()}
        for rank in range(world.size):
            own = optimizer.fresh_state(cell, rank) if rank in holders else elsewhere
            for state in own.values():
                found[rank].update({key: size_of(value) for key, value in state.items()})
        if cell.by_rows:
            samples = cell.statistics[0].samples
            rows = Extent(samples, seen[cell.name])
            found[cell.owner]["rows"] += cell.curvature.rows_held(cell.layer, rows)
    return found


def as_squares(optimizer: SecondOrder, now: int) -> int:
    """What so many bytes would be with three squares a statistic, and with the last directions."""
    for cell in optimizer.cells:
        now -= sum(math.prod(held.shape) * held.dtype.itemsize for held in cell.held())
        now += 3 * 4 * sum(math.prod(moment.shape(cell.layer)) for moment in cell.statistics)
        now += 4 * cell.layer.shape.numel * ("stretch" in cell.state())
    return now


def counted(net: Net) -> list[dict[str, Any]]:
    """A row an optimizer: bytes of the largest and the smallest share by ranks."""
    rows = []
    for name, settings in OTHERS.items():
        model = on_meta(net)
        held = of_others(settings.build(model, World.alone()), model)
        rows.append({"optimizer": name, "held": {str(ranks): [held, held] for ranks in RANKS}})
    for name, kind in OURS.items():
        row: dict[str, Any] = {"optimizer": name, "held": {}}
        for ranks in RANKS:
            model = on_meta(net)
            optimizer = kind(model, 0.1, world=World(Silent(ranks)))  # type: ignore[arg-type]
            by_rank = of_ours(optimizer, model, net.sample())
            totals = [sum(own.values()) for own in by_rank]
            row["held"][str(ranks)] = [min(totals), max(totals)]
            if ranks == 1:
                row["by name"] = dict(by_rank[0].most_common())
                if name in PACKED:
                    row["squares"] = as_squares(optimizer, totals[0])
        rows.append(row)
    return rows


def mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"


def span(held: Sequence[int]) -> str:
    """The smallest and the largest share."""
    return mib(held[1]) if mib(held[0]) == mib(held[1]) else f"{mib(held[0])} to {mib(held[1])}"


def table(content: dict[str, Any]) -> str:
    lines = []
    for case in content["cases"]:
        lines += [
            f"\n{case['case']}, {case['parameters'] / 1e6:.1f} million weights, {mib(4 * case['parameters'])} MiB:\n",
            f"| state, MiB | {' | '.join(f'{n} rank' + 's' * (n > 1) for n in RANKS)} | as squares, 1 rank | share |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in case["rows"]:
            was = row.get("squares")
            before = ["", ""] if was is None else [mib(was), f"{row['held']['1'][1] / was:.1%}"]
            cells = [row["optimizer"], *(span(row["held"][str(n)]) for n in RANKS), *before]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print the tables of the results")
    told = parser.parse_args()
    if not told.show:
        record = Record(told.out, "cpu")
        for name, net in NETS.items():
            case = {"case": name, "parameters": sum(p.numel() for p in on_meta(net).parameters())}
            if record.find(case) is None:
                record.add(case, counted(net))
    print(table(read(told.out)))


if __name__ == "__main__":
    main()
