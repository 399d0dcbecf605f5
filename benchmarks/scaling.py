"""What ranks change: time, memory and traffic of a step on 1, 2 and 4 processes that talk over gloo.

    python benchmarks/scaling.py         (6 minutes on two cores; stopped, it goes on where it was)

ResNet-20 on patterns, the same batch of 256 whatever the ranks (strong scaling), one thread a rank. Times need a core a
rank: with fewer, ranks wait for each other. Traffic is the payload that rank 0 hands over in a step, by kind, the mean
over steps; memory is all ranks' optimizer state, the largest and the smallest share.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist  # noqa: TID251  (as a launcher does)
import torch.multiprocessing as mp
from record import Record
from torch import Tensor
from torch.nn.functional import cross_entropy

from natgrad.parallel import World
from natgrad_lab.models import CifarResNet
from natgrad_lab.train.optimizers import KFac, Nlcg, Seng, Sgd, SpNgd

BATCH, STEPS, WARM = 256, 16, 4
RANKS = (1, 2, 4)
SETTINGS = {
    "SGD": Sgd(lr=0.05, nesterov=True),
    "SP-NGD": SpNgd(lr=0.003),
    "K-FAC, every 8": KFac(lr=0.003, refresh=8),
    "SENG, every 16": Seng(lr=0.05, refresh=16),
    "NLCG": Nlcg(lr=0.05),
}
"""Fixed intervals divide STEPS, so that a mean step is one of a long run."""


def work(rank: int, ranks: int, name: str, folder: str) -> None:
    """One rank's run; its figures go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    try:
        torch.save(figures(World(), name), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def figures(world: World, name: str) -> dict[str, Any]:
    """Milliseconds of each step, bytes handed over in a step by kind, bytes of state."""
    torch.manual_seed(0)
    model, settings = CifarResNet(depth=20).build((3, 32, 32), 100), SETTINGS[name]
    optimizer: Any = settings.build(model, world)
    patterns, spent, sent = torch.randn(100, 3, 32, 32), [], Counter()
    for step in range(STEPS + WARM):
        generator = torch.Generator().manual_seed(step)
        labels = torch.randint(100, (BATCH,), generator=generator)
        images = patterns[labels] + torch.randn(BATCH, 3, 32, 32, generator=generator)
        images, labels = images.chunk(world.size)[world.rank], labels.chunk(world.size)[world.rank]
        world.max([torch.zeros(1)], "scalars")  # begin together
        world.sent.clear()
        began = time.perf_counter()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        settings.take(optimizer, loss.detach(), lambda images=images: model(images))
        optimizer.zero_grad()
        spent.append(1e3 * (time.perf_counter() - began))
        if step >= WARM:
            sent.update(optimizer.traffic() if hasattr(optimizer, "traffic") else world.sent)
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    traffic = {kind: count / STEPS for kind, count in sent.items()}
    return {"ms": spent[WARM:], "sent": traffic, "state": sum(t.numel() * t.element_size() for t in tensors)}


def measure(ranks: int, name: str) -> list[dict[str, Any]]:
    """The row of one optimizer on so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (ranks, name, folder), ranks)
        told = [torch.load(f"{folder}/{rank}.pt") for rank in range(ranks)]
    state = [one["state"] / 2**20 for one in told]
    return [
        {
            "median_ms": round(statistics.median(told[0]["ms"]), 1),
            "mean_ms": round(statistics.fmean(told[0]["ms"]), 1),
            "state_mib": [round(min(state), 2), round(max(state), 2)],
            "sent_kb": {kind: round(count / 1e3, 1) for kind, count in sorted(told[0]["sent"].items())},
        }
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scaling-cpu.json")
    record = Record(parser.parse_args().out, "cpu")
    for name in SETTINGS:
        for ranks in RANKS:
            case = {"optimizer": name, "ranks": ranks, "batch": BATCH, "steps": STEPS, "cores": os.cpu_count()}
            rows = record.find(case)
            if not rows:
                rows = measure(ranks, name)
                record.add(case, rows)
            print(f"{name:18}{ranks} ranks {rows[0]}", flush=True)


if __name__ == "__main__":
    main()
