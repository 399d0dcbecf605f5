"""Bytes on the fullest rank of a sharded model: parameters, gradients and state, beside AdamW's.

    python benchmarks/sharded.py           (a minute; everything is on meta tensors)
    python benchmarks/sharded.py --show    (the tables of the committed results)

With `fully_shard` every rank holds a part of each parameter, of its gradient and of each vector of the state; natgrad's
statistics and inverses are whole at the owners of their layers. Without it every rank holds all parameters and all
gradients, AdamW's state is on every rank, and natgrad's at the owners. What passes gather for a while is not counted.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from memory import NETS, OURS, Net, Silent, mib, of_others, of_ours, on_meta, size_of
from record import Record, read
from torch import nn

from natgrad.layers.shards import Cut
from natgrad.optim import SecondOrder
from natgrad.parallel import World
from natgrad_lab.train.optimizers import AdamW

RESULTS = Path(__file__).parent / "results" / "sharded.json"
RANKS = (8, 64)
CASES = ("ResNet-50", "GPT-2 small with a head of its own")


def rows(n: int, ranks: int, rank: int) -> int:
    """How many of n rows a rank has."""
    most = -(-n // ranks)
    return min((rank + 1) * most, n) - min(rank * most, n)


def parts(model: nn.Module, ranks: int) -> list[int]:
    """The bytes of all parameters by rank."""
    return [
        sum(size_of(p) // len(p) * rows(len(p), ranks, rank) for p in model.parameters() if p.dim())
        for rank in range(ranks)
    ]


def state_of(optimizer: SecondOrder, model: nn.Module, net: Net) -> list[int]:
    """The bytes of a sharded optimizer's state by rank."""
    ranks = optimizer.world.size
    found = of_ours(optimizer, model, net.sample())
    for cell in optimizer.cells:
        form = Cut(cell.layer).form
        names = {held.name for held in cell.held()}
        elsewhere = optimizer.fresh_state(cell, -1)
        for parameter, state in optimizer.fresh_state(cell, cell.owner).items():
            for key, value in state.items():
                if key in names or key in elsewhere[parameter]:
                    continue
                found[cell.owner][key] -= size_of(value)
                for rank in range(ranks):
                    cut = value.shape == cell.layer.shape
                    share = size_of(value) // form[1] * rows(form[1], ranks, rank) if cut else size_of(value)
                    found[rank][key] += share
    return [sum(own.values()) for own in found]


def counted(net: Net, ranks: int) -> list[dict[str, Any]]:
    """For each optimizer the bytes of parameters, gradients and state on the rank that holds most in all."""
    model = on_meta(net)
    whole, shards = sum(map(size_of, model.parameters())), parts(model, ranks)
    adam = of_others(AdamW().build(model, World.alone()), model)

    def row(name: str, how: str, weights: list[int], state: list[int]) -> dict[str, Any]:
        fullest = max(range(ranks), key=lambda rank: 2 * weights[rank] + state[rank])
        own = weights[fullest]
        held = {"parameters": own, "gradients": own, "state": state[fullest]}
        return {"optimizer": name, "how": how, "held": held}

    found = [
        row("AdamW", "DDP", [whole] * ranks, [adam] * ranks),
        row("AdamW", "fully_shard", shards, [2 * part for part in shards]),
    ]
    for name, kind in OURS.items():
        for how in ("DDP", "fully_shard"):
            model = on_meta(net)
            optimizer = kind(model, 0.1, world=World(Silent(ranks)))  # type: ignore[arg-type]
            if how == "DDP":
                by_rank: list[Counter[str]] = of_ours(optimizer, model, net.sample())
                found.append(row(name, how, [whole] * ranks, [sum(own.values()) for own in by_rank]))
            else:
                found.append(row(name, how, shards, state_of(optimizer, model, net)))
    return found


def table(content: dict[str, Any]) -> str:
    lines = []
    for case in content["cases"]:
        lines += [
            f"\n{case['case']} on {case['ranks']} ranks, MiB on the fullest rank:\n",
            "| optimizer | ranks hold | parameters | gradients | state | in all |",
            "| --- | --- | ---: | ---: | ---: | ---: |",
        ]
        for row in case["rows"]:
            held = row["held"]
            sizes = [mib(held[name]) for name in ("parameters", "gradients", "state")]
            lines.append(f"| {' | '.join([row['optimizer'], row['how'], *sizes, mib(sum(held.values()))])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print the tables of the results")
    told = parser.parse_args()
    if not told.show:
        record = Record(told.out, "cpu")
        for name in CASES:
            for ranks in RANKS:
                case = {"case": name, "ranks": ranks}
                if record.find(case) is None:
                    record.add(case, counted(NETS[name], ranks))
    print(table(read(told.out)))


if __name__ == "__main__":
    main()
