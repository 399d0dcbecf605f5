"""What a step costs beside SGD's, as ratios of medians in one interleaved run.

    python benchmarks/overhead.py --depth 20 --batch 128

Machines are shared and noisy, so nothing is compared across runs: in every round each contender takes one step, in
shuffled order, and the table gives the median over rounds of its seconds divided by SGD's median.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import natgrad
from natgrad.models import CifarResNet

NEVER = 10**9


def contenders(make):
    """Name -> (model, optimizer, take one step measuring or not)."""

    def sgd():
        model = make()
        return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)

    def spngd(refresh, **options):
        def build():
            model = make()
            return model, natgrad.SPNGD(model, lr=0.02, refresh=refresh, **options)

        return build

    return {
        "sgd": sgd,
        "spngd nothing stale": spngd(NEVER),
        "spngd all stale, samples=8": spngd(1),
        "spngd all stale, samples=4": spngd(1, samples=4),
        "spngd all stale, every row": spngd(1, samples=None),
        "spngd adaptive": spngd(natgrad.Adaptive()),
    }


def step(model, optimizer, images, labels) -> float:
    if images.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    optimizer.zero_grad()
    cross_entropy(model(images), labels).backward()
    optimizer.step()
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(options) -> dict:
    torch.manual_seed(0)
    device = torch.device(options.device)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    architecture = CifarResNet(depth=options.depth)

    def make() -> nn.Module:
        torch.manual_seed(0)
        return architecture.build((3, 32, 32), 100).to(device, memory_format=layout)

    images = torch.randn(options.batch, 3, 32, 32).to(device, memory_format=layout)
    labels = torch.randint(0, 100, (options.batch,), device=device)
    built = {name: build() for name, build in contenders(make).items()}
    for model, optimizer in built.values():
        for _ in range(2):
            step(model, optimizer, images, labels)
    seconds: dict[str, list[float]] = {name: [] for name in built}
    order = list(built)
    for _ in range(options.rounds):
        random.shuffle(order)
        for name in order:
            seconds[name].append(step(*built[name], images, labels))
    base = statistics.median(seconds["sgd"])
    return {
        name: {"seconds": statistics.median(times), "ratio": statistics.median(times) / base}
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options)
    for name, row in rows.items():
        print(f"{name:32} {row['seconds'] * 1e3:9.1f} ms  {row['ratio']:.3f}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "command": f"python benchmarks/overhead.py --depth {options.depth} --batch {options.batch} "
        f"--rounds {options.rounds} --threads {options.threads} --device {options.device}",
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine(),
        "commit": commit.stdout.strip(),
        "rows": rows,
    }
    options.out.mkdir(exist_ok=True)
    name = f"overhead-resnet{options.depth}-{options.batch}-{options.device}.json"
    (options.out / name).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
