"""Bytes on the fullest rank of a sharded model: parameters, gradients and state, beside AdamW's.

    python benchmarks/sharded.py           (two minutes; everything is on meta tensors)
    python benchmarks/sharded.py --show    (the tables of the committed results)

The planner counts (`natgrad plan --shard`): the trainer's optimizers are built on models that `fully_shard` has cut
over ranks that are not there, and say what each rank holds. Every rank holds a part of each parameter, of its gradient
and of each vector of the state; natgrad's statistics and inverses are whole at the owners of their layers. Without
`fully_shard` every rank holds all parameters and all gradients, AdamW's state is on every rank, and natgrad's at the
owners. What passes gather for a while is not counted.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from memory import mib
from record import Record, read

from natgrad_lab.models import ImageResNet, Transformer
from natgrad_lab.plan.fsdp_passes import held
from natgrad_lab.plan.machines import named
from natgrad_lab.plan.memory import state_by_rank
from natgrad_lab.plan.scaling import Network, Planner
from natgrad_lab.train.optimizers import AdamW, KFac, Nlcg, Seng, Settings, SpNgd

RESULTS = Path(__file__).parent / "results" / "sharded.json"
RANKS = (8, 64)
GPT2 = Transformer(blocks=12, width=768, heads=12)
CASES = {
    "ResNet-50": Network("ResNet-50", lambda: ImageResNet(50).build((3, 224, 224), 1000), (3, 224, 224)),
    "GPT-2 small with a head of its own": Network("GPT-2", lambda: GPT2.build((1, 1, 1024), 50257), (1024,), 50257),
}
OPTIMIZERS: dict[str, Settings] = {"AdamW": AdamW(), "SP-NGD": SpNgd(), "K-FAC": KFac(), "SENG": Seng(), "NLCG": Nlcg()}
SAMPLES = 256
"""In a step, over all ranks: as many as SENG keeps rows of."""
WAYS = {"DDP": None, "fully_shard": 1}
"""How ranks hold a model: the number of replicas of one that is cut."""


def by_rank(network: Network, settings: Settings, ranks: int, replicas: int | None) -> list[dict[str, int]]:
    """Bytes of parameters, gradients and state on every rank."""
    account = Planner(network, named("h100"), replicas=replicas).account(settings, ranks, SAMPLES)
    parameters, sharding = list(account.model.parameters()), account.rehearsal.sharding
    state = state_by_rank(account.rehearsal, account.held)
    weights = [held(parameters, sharding, rank) for rank in range(ranks)]
    return [{"parameters": own, "gradients": own, "state": more} for own, more in zip(weights, state)]


def counted(network: Network, ranks: int) -> list[dict[str, Any]]:
    """For each optimizer the bytes of the rank that holds most in all."""
    return [
        {
            "optimizer": name,
            "how": how,
            "held": max(by_rank(network, settings, ranks, replicas), key=lambda own: sum(own.values())),
        }
        for name, settings in OPTIMIZERS.items()
        for how, replicas in WAYS.items()
    ]


def table(content: dict[str, Any]) -> str:
    lines = []
    for case in content["cases"]:
        lines += [
            f"\n{case['case']} on {case['ranks']} ranks, MiB on the fullest rank:\n",
            "| optimizer | ranks hold | parameters | gradients | state | in all |",
            "| --- | --- | ---: | ---: | ---: | ---: |",
        ]
        for row in case["rows"]:
            own = row["held"]
            sizes = [mib(own[name]) for name in ("parameters", "gradients", "state")]
            lines.append(f"| {' | '.join([row['optimizer'], row['how'], *sizes, mib(sum(own.values()))])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print the tables of the results")
    told = parser.parse_args()
    if not told.show:
        record = Record(told.out, "cpu")
        for name, network in CASES.items():
            for ranks in RANKS:
                case = {"case": name, "ranks": ranks}
                if record.find(case) is None:
                    record.add(case, counted(network, ranks))
    print(table(read(told.out)))


if __name__ == "__main__":
    main()
