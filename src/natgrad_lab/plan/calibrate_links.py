"""What messages take between the ranks of this world, and how much longer work takes where all of them work.

Small and large all-reduces give latency and bandwidth as links.py uses them. Ranks on several hosts measure the link
between hosts, ranks on one host that inside of it.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from natgrad.parallel import World
from natgrad_lab.plan.bench import Bench
from natgrad_lab.plan.machine import Link, Machine

SMALL, LARGE = 1, 2**20  # numbers of a message
ROUNDS = 60


def link_between(world: World, device: torch.device) -> tuple[Link, float]:
    """The link that the ranks of this world share, and the host's time for beginning a message."""
    little, host = timed(world, device, SMALL)
    much, _ = timed(world, device, LARGE)
    steps = 2 * (world.size - 1)
    bandwidth = 2 * (world.size - 1) / world.size * 4 * LARGE / max(much - little, 1e-7)
    latency = max(1e-7, (little - host) / steps)
    return Link(latency, bandwidth), host


def timed(world: World, device: torch.device, numbers: int) -> tuple[float, float]:
    """Seconds of one all-reduce on the clock and of the processor, lower quartiles."""
    buffer = torch.zeros(numbers, device=device)
    walls, hosts = [], []
    for _ in range(ROUNDS):
        world.transport.all_reduce(torch.zeros(1, device=device))  # all are here
        wall, host = time.perf_counter(), time.process_time()
        world.transport.all_reduce(buffer)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        walls.append(time.perf_counter() - wall)
        hosts.append(time.process_time() - host)
    return quartile(walls), min(quartile(hosts), quartile(walls) / 2)


def quartile(values: list[float]) -> float:
    """The lower one."""
    return statistics.quantiles(values, n=4)[0]


def crowding(world: World, device: torch.device) -> float:
    """How much longer convolutions and passes over memory take where all ranks do them, the mean of both."""
    bench = Bench(device)
    x, w = bench.cold(64, 16, 32, 32), bench.normal(16, 16, 3, 3)
    works: list[Callable[[], Any]] = [lambda: torch.conv2d(x(), w, padding=1), lambda: x() + x()]
    alone = [bench.seconds(work) if world.rank == 0 else 0.0 for work in works]
    world.transport.all_reduce(torch.zeros(1, device=device))
    together = [bench.seconds(work) for work in works]
    ratios = torch.tensor([b / a if a else 0.0 for a, b in zip(alone, together)], dtype=torch.float64)
    world.max([ratios])
    return max(1.0, float(ratios.mean()))


def links_of(world: World, device: torch.device) -> dict[str, Any]:
    """The fields of a machine that ranks measure. All of them must call it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        link, host = link_between(world, device)
        found: dict[str, Any] = {"call": host, "crowding": crowding(world, device)}
    finally:
        torch.set_num_threads(threads)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    return {**found, "between" if local < world.size else "inside": link, "local": local}


def with_links(machine: Machine, found: dict[str, Any], ranks: int) -> Machine:
    """The machine with what its ranks have measured."""
    local = found["local"]
    how = f"measured by {ranks} ranks, {local} to a host"
    sources = {k: v for k, v in machine.sources.items() if k != "inside, between, call, crowding"}
    sources |= {"call, crowding": how, "between" if local < ranks else "inside": how}
    if machine.device == "cpu" and local == ranks:
        sources["between"] = "none: ranks beyond the cores share them"
    return replace(machine, **{k: v for k, v in found.items() if k != "local"}, sources=sources)
