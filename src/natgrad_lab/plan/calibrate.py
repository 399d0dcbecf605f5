"""`natgrad plan --calibrate FILE`: what this machine does in a second, measured by natgrad's own operations.

Each kind of work is timed at a few sizes, a CPU on one thread as a rank has it. The Python around a layer is what a
step of many tiny layers takes beyond what the plan counts. Links are measured by ranks (calibrate_links.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.curvature import CountSketch
from natgrad.layers import layer_of
from natgrad.layers.layer import gram
from natgrad.layers.op_cost import OpCost, moved, product
from natgrad.linalg import damped_cholesky, damped_inverse, eigen
from natgrad_lab.plan.bench import Bench
from natgrad_lab.plan.calibrate_steps import framed, python_of, together
from natgrad_lab.plan.machine import Machine, Table

SQUARES = (16, 64, 144, 288, 576, 1152)


BACK = torch.ops.aten.convolution_backward


def convolutions(bench: Bench) -> dict[str, Table]:
    """Forward and backward passes by channels, at images that networks have there."""
    forward, backward = [], []
    shapes = ((3, 16, 32, 64), (16, 16, 32, 64), (32, 32, 16, 64), (64, 64, 8, 128), (128, 128, 14, 16))
    for channels, out, side, n in (*shapes, (256, 256, 14, 8), (512, 512, 7, 8)):
        x, w = bench.cold(n * bench.times, channels, side, side), bench.normal(out, channels, 3, 3)
        y = torch.conv2d(x(), w, padding=1)
        dy = bench.cold(*y.shape)
        flops, size = 2.0 * y.numel() * w[0].numel(), min(3 * channels, out)
        geometry: Any = (None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1)
        forward.append(bench.rate(OpCost("conv", flops, 0, size), lambda x=x, w=w: torch.conv2d(x(), w, padding=1)))
        call = OpCost("conv_backward", 2 * flops, 0, size)
        backward.append(
            bench.rate(call, lambda x=x, w=w, dy=dy, one=geometry: BACK(dy(), x(), w, *one, (True, True, False)))
        )
    return {"conv": tuple(forward), "conv_backward": tuple(backward)}


def matrices(bench: Bench) -> dict[str, Table]:
    """Products, symmetric products, inverses and factors by their sides."""
    found: dict[str, list[tuple[float, float]]] = {k: [] for k in ("gemm", "gram", "inverse", "cholesky", "eigen")}
    for d in (16, 64, 256, 1024):
        a, b = bench.normal(max(256, d), d), bench.normal(d, d)
        found["gemm"].append(bench.rate(product(len(a), d, d), lambda a=a, b=b: a @ b))
    for d in SQUARES:
        rows = bench.normal(max(8192, 4 * d) if d < 100 else 8 * d if d < 1000 else 4 * d, d)
        found["gram"].append(bench.rate(OpCost("gram", 2.0 * len(rows) * d * d, 0, d), lambda r=rows: gram(r)))
        square = (rows[:d].T @ rows[:d] / d).unsqueeze(0)
        damping = torch.full((1,), 0.1, device=bench.device)
        work = OpCost("inverse", float(d**3), 0, d, 8)
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
        x, y = bench.cold(numel), bench.cold(numel)
        plain.append(bench.rate(moved(numel, 3), lambda x=x, y=y: x() + y()))
    for channels, side, n in ((64, 8, 32), (16, 32, 32), (16, 32, 128)):
        module = nn.BatchNorm2d(channels).to(bench.device)
        x = bench.cold(n * bench.times, channels, side, side)
        g = bench.cold(*x().shape)
        work = OpCost("norm", 0, 4.0 * 8 * x().numel(), 1, 2)
        norms.append(bench.rate(work, lambda m=module, x=x, g=g: there_and_back(m, x(), g())))
    for channels, side, n in ((16, 32, 8), (64, 8, 32), (64, 8, 64)):  # whole, at most as much as is read at a time
        layer: Any = layer_of(nn.Conv2d(channels, 16, 3, padding=1, bias=False).to(bench.device))
        x, places = bench.cold(n, channels, side, side), n * side * side
        work = moved(places * layer.shape.inner, 2, "gather")
        gathers.append(bench.rate(work, lambda x=x, layer=layer: layer.rows(x())))
        index = torch.randint(places, (m := places // 8,), device=bench.device).sort().values
        work = moved(m * layer.shape.inner, 2, "gather")
        gathers.append(bench.rate(work, lambda x=x, index=index, layer=layer: layer.rows(x(), index)))
    for length, n in ((2304, 256), (36864, 128)):
        sketch, x = CountSketch(), bench.normal(n, length)
        drawn = sketch.draw(length, 4096, torch.Generator(bench.device).manual_seed(0))
        work = moved(n * length, 1, "scatter")
        scatters.append(bench.rate(work, lambda s=sketch, d=drawn, x=x: s.apply(d, x, 4096)))
    tables = {"elementwise": plain, "norm": norms, "gather": gathers, "scatter": scatters}
    return {kind: tuple(sorted(rates)) for kind, rates in tables.items()}


def there_and_back(module: nn.Module, x: Tensor, dy: Tensor) -> None:
    """One forward and one backward pass."""
    x = x.detach().requires_grad_()
    torch.autograd.grad(module(x), x, dy)


def measured(device: torch.device, cores: int) -> Machine:
    """The machine that this is, its links still those of one that is known."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        bench = Bench(device)
        launch = bench.measure_launch()
        rates = {**convolutions(bench), **matrices(bench), **memory(bench)}
        machine = framed(device, cores, rates, launch)
        machine = replace(machine, together=together(bench, machine))
        return replace(machine, **python_of(bench, machine))
    finally:
        torch.set_num_threads(threads)
