"""`natgrad plan --calibrate FILE`: what this machine does in a second, measured by natgrad's own operations.

Each kind of work is timed at a few sizes, a CPU on one thread as a rank has it. The Python around a layer is what a
step of many tiny layers takes beyond what the plan counts. Links are measured by ranks (calibrate_links.py).
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.curvature import CountSketch
from natgrad.layers import layer_of
from natgrad.layers.base import gram
from natgrad.layers.work import Work, moved, product
from natgrad.linalg import damped_cholesky, damped_inverse, eigen
from natgrad.optim import SPNGD
from natgrad.parallel import World
from natgrad.plan.machine import Link, Machine, Table
from natgrad.plan.machines import named
from natgrad.plan.stages import Account
from natgrad.train.machine import processor

BUDGET = 0.25
"""Seconds for one figure, after a first time that does not count."""
LAYERS = 40
SQUARES = (16, 64, 144, 288, 576, 1152)


class Bench:
    """Times operations on one device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.times = 8 if device.type == "cuda" else 1  # as many more samples, so that it has something to do

    def seconds(self, work: Callable[[], Any]) -> float:
        """The lower quartile of the times that fit into the budget: neighbours make it longer, nothing shorter."""
        self._once(work)
        taken, start = [], time.perf_counter()
        while len(taken) < 5 or (time.perf_counter() - start < BUDGET and len(taken) < 2000):
            taken.append(self._once(work))
        return statistics.quantiles(taken, n=4)[0]

    def _once(self, work: Callable[[], Any]) -> float:
        """Seconds of the processor where that does the work: others on the same cores do not count."""
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        start = clock()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return clock() - start

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device)

    def rate(self, work: Work, call: Callable[[], Any]) -> tuple[float, float]:
        """(size, operations or bytes a second), the launch left out."""
        whole = self.seconds(call)
        taken = max(whole / 4, whole - work.calls * self.launch)
        if work.flops:
            return work.size, work.flops / taken
        return work.bytes / max(work.calls, 1), work.bytes / taken

    launch = 0.0

    def measure_launch(self) -> float:
        """Seconds of the host for one small operation: the mean of some that natgrad uses."""
        x, y = self.normal(1, 4, 4), self.normal(1, 4, 4)

        def some() -> None:
            for _ in range(20):
                torch.cat([(x + y).flatten(), x.mul(2.0).view(-1)]).unsqueeze(0)

        self.launch = self.seconds(some) / (20 * 4)  # views are launched too, at a third of the cost
        return self.launch


def convolutions(bench: Bench) -> dict[str, Table]:
    """Forward and backward passes by channels, at images that networks have there."""
    forward, backward = [], []
    shapes = ((3, 16, 32, 64), (16, 16, 32, 64), (32, 32, 16, 64), (64, 64, 8, 128), (128, 128, 14, 16))
    for channels, out, side, n in (*shapes, (256, 256, 14, 8), (512, 512, 7, 8)):
        x, w = bench.normal(n * bench.times, channels, side, side), bench.normal(out, channels, 3, 3)
        y = torch.conv2d(x, w, padding=1)
        flops, size = 2.0 * y.numel() * w[0].numel(), min(3 * channels, out)
        geometry: Any = (None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1)
        both = (True, True, False)
        forward.append(bench.rate(Work("conv", flops, 0, size), lambda x=x, w=w: torch.conv2d(x, w, padding=1)))
        call = Work("conv_backward", 2 * flops, 0, size)
        back = torch.ops.aten.convolution_backward
        backward.append(bench.rate(call, partial(back, y, x, w, *geometry, both)))
    return {"conv": tuple(forward), "conv_backward": tuple(backward)}


def matrices(bench: Bench) -> dict[str, Table]:
    """Products, symmetric products, inverses and factors by their sides."""
    found: dict[str, list[tuple[float, float]]] = {k: [] for k in ("gemm", "gram", "inverse", "cholesky", "eigen")}
    for d in (16, 64, 256, 1024):
        a, b = bench.normal(max(256, d), d), bench.normal(d, d)
        found["gemm"].append(bench.rate(product(len(a), d, d), lambda a=a, b=b: a @ b))
    for d in SQUARES:
        rows = bench.normal(max(8192, 4 * d) if d < 100 else 8 * d if d < 1000 else 4 * d, d)
        found["gram"].append(bench.rate(Work("gram", 2.0 * len(rows) * d * d, 0, d), lambda r=rows: gram(r)))
        square = (rows[:d].T @ rows[:d] / d).unsqueeze(0)
        damping = torch.full((1,), 0.1, device=bench.device)
        work = Work("inverse", float(d**3), 0, d, 8)
        found["inverse"].append(bench.rate(work, lambda s=square, t=damping: damped_inverse(s, t)))
        if d in (64, 288, 576):
            third = work._replace(kind="cholesky", flops=d**3 / 3, calls=6)
            found["cholesky"].append(bench.rate(third, lambda s=square, t=damping: damped_cholesky(s, t)))
            found["eigen"].append(bench.rate(work._replace(kind="eigen", calls=6), lambda s=square: eigen(s)))
    return {kind: tuple(rates) for kind, rates in found.items()}


def memory(bench: Bench) -> dict[str, Table]:
    """Passes over memory by the bytes of one operation."""
    plain, norms, gathers, scatters = [], [], [], []
    for numel in (10**3, 10**5, 10**6, 3 * 10**6, 10**7):
        x, y = bench.normal(numel), bench.normal(numel)
        plain.append(bench.rate(moved(numel, 3), lambda x=x, y=y: x + y))
    for channels, side, n in ((64, 8, 32), (16, 32, 32), (16, 32, 128)):
        module = nn.BatchNorm2d(channels).to(bench.device)
        x = bench.normal(n * bench.times, channels, side, side).requires_grad_()
        g = torch.ones_like(x)
        work = Work("norm", 0, 4.0 * 8 * x.numel(), 1, 2)
        norms.append(bench.rate(work, lambda m=module, x=x, g=g: torch.autograd.grad(m(x), x, g)))
    for channels, side, n in ((16, 32, 8), (64, 8, 32), (64, 8, 64)):  # whole, at most as much as is read at a time
        layer: Any = layer_of(nn.Conv2d(channels, 16, 3, padding=1, bias=False).to(bench.device))
        x, places = bench.normal(n, channels, side, side), n * side * side
        work = moved(places * layer.shape.inner, 2, "gather")
        gathers.append(bench.rate(work, lambda x=x, layer=layer: layer.rows(x)))
        index = torch.randint(places, (m := places // 8,), device=bench.device).sort().values
        work = moved(m * layer.shape.inner, 2, "gather")
        gathers.append(bench.rate(work, lambda x=x, index=index, layer=layer: layer.rows(x, index)))
    for length, n in ((2304, 256), (36864, 128)):
        sketch, x = CountSketch(), bench.normal(n, length)
        drawn = sketch.draw(length, 4096, torch.Generator(bench.device).manual_seed(0))
        work = moved(n * length, 1, "scatter")
        scatters.append(bench.rate(work, lambda s=sketch, d=drawn, x=x: s.apply(d, x, 4096)))
    tables = {"elementwise": plain, "norm": norms, "gather": gathers, "scatter": scatters}
    return {kind: tuple(sorted(rates)) for kind, rates in tables.items()}


def measured(device: torch.device, cores: int) -> Machine:
    """The machine that this is, its links still those of one that is known."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        bench = Bench(device)
        launch = bench.measure_launch()
        rates = {**convolutions(bench), **matrices(bench), **memory(bench)}
        machine = framed(device, cores, rates, launch)
        return replace(machine, **python_of(device, machine))
    finally:
        torch.set_num_threads(threads)


def framed(device: torch.device, cores: int, rates: dict[str, Table], launch: float) -> Machine:
    """The machine without what only ranks or whole steps can say."""
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else processor()
    how = "measured by natgrad plan --calibrate"
    links = named("h100") if gpu else None
    total = torch.cuda.get_device_properties(device).total_memory if gpu else host_memory() / cores
    sources = {"rates, launch, layer, refresh": f"{how}, {name}, torch {torch.__version__}, {platform.platform()}"}
    sources["inside, between, call, crowding"] = "assumed, as for h100" if links else "assumed"
    return Machine(
        name,
        "gpu" if gpu else "cpu",
        rates,
        launch,
        total,
        torch.cuda.device_count() if gpu else cores,
        links.inside if links else Link(1e-4, 1e9),
        links.between if links else Link(0.0, 0.0),
        call=links.call if links else 1e-4,
        sources=sources,
    )


def host_memory() -> float:
    """Bytes of the host."""
    import os

    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def python_of(device: torch.device, machine: Machine) -> dict[str, float]:
    """The Python of a layer in a step, and in measuring: what steps of tiny layers take beyond what is counted."""
    layers = [nn.Linear(4, 4) for _ in range(LAYERS)]
    model = nn.Sequential(*layers).to(device)
    optimizer, x = SPNGD(model, lr=1e-6, refresh=2, world=World()), torch.randn(8, 4, device=device)
    bench, taken = Bench(device), {True: [], False: []}
    for step in range(40):
        before = optimizer.seconds.get("measure", 0.0)  # hooks add to it while the network runs
        model(x).square().sum().backward()
        taken[step % 2 == 0].append(bench._once(optimizer.step) + optimizer.seconds.get("measure", 0.0) - before)
        optimizer.zero_grad()
    counted = counted_of(model, machine)
    stale, fresh = (statistics.quantiles(taken[kind][2:], n=4)[0] for kind in (False, True))
    layer = max(0.0, stale - counted[False]) / LAYERS
    return {"layer": layer, "refresh": max(0.0, fresh - stale - (counted[True] - counted[False])) / LAYERS}


def counted_of(model: nn.Module, machine: Machine) -> dict[bool, float]:
    """What the plan counts for such a step beside the network's passes: {measured: seconds}."""
    from natgrad.plan.scaling import Network, Planner
    from natgrad.train.optimizers import SpNgd

    make = Network("tiny layers", lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in model)), (4,))  # type: ignore[arg-type]
    account: Account = Planner(make, machine).account(SpNgd(refresh=2), 1, 8)
    passes = ("forward", "backward")
    return {fresh: sum(v for k, v in account.stages(fresh)[0].items() if k not in passes) for fresh in (False, True)}
