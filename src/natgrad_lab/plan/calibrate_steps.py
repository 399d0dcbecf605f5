"""What only whole steps can say of a machine: how operations do in a row, and the Python around a layer."""

from __future__ import annotations

import os
import platform
import statistics

import torch
from torch import nn

from natgrad.optim import SPNGD
from natgrad.parallel import World
from natgrad_lab.models import CifarResNet
from natgrad_lab.plan.bench import Bench
from natgrad_lab.plan.machine import Link, Machine, Table
from natgrad_lab.plan.machines import named
from natgrad_lab.plan.scaling import Network, Planner
from natgrad_lab.plan.stages import Account
from natgrad_lab.train.environment import processor
from natgrad_lab.train.optimizers import Sgd, SpNgd

LAYERS = 40


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
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def together(bench: Bench, machine: Machine) -> float:
    """What the passes of a small network take over what the plan counts for them."""
    samples = 64 * bench.times
    net, shape = CifarResNet(depth=8), (3, 32, 32)
    model, x = net.build(shape, 10).to(bench.device), bench.normal(samples, *shape)
    make = Network("a small network", lambda: net.build(shape, 10), shape)
    stages = Planner(make, machine).account(Sgd(), 1, samples).stages(False)[0]
    taken = bench.seconds(lambda: model(x).square().mean().backward())
    return taken / (stages["forward"] + stages["backward"])


def python_of(bench: Bench, machine: Machine) -> dict[str, float]:
    """The Python of a layer in a step, and in measuring: what steps of tiny layers take beyond what is counted."""
    layers = [nn.Linear(4, 4) for _ in range(LAYERS)]
    model = nn.Sequential(*layers).to(bench.device)
    optimizer, x = SPNGD(model, lr=1e-6, refresh=2, world=World()), bench.normal(8, 4)
    taken: dict[bool, list[float]] = {True: [], False: []}
    for step in range(40):
        before = optimizer.seconds.get("measure", 0.0)  # hooks add to it while the network runs
        model(x).square().sum().backward()
        taken[step % 2 == 0].append(bench.once(optimizer.step) + optimizer.seconds.get("measure", 0.0) - before)
        optimizer.zero_grad()
    counted = counted_of(model, machine)
    stale, fresh = (statistics.quantiles(taken[kind][2:], n=4)[0] for kind in (False, True))
    layer = max(0.0, stale - counted[False]) / LAYERS
    return {"layer": layer, "refresh": max(0.0, fresh - stale - (counted[True] - counted[False])) / LAYERS}


def counted_of(model: nn.Module, machine: Machine) -> dict[bool, float]:
    """What the plan counts for such a step beside the network's passes: {measured: seconds}."""
    make = Network("tiny layers", lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in model)), (4,))  # type: ignore[arg-type]
    account: Account = Planner(make, machine).account(SpNgd(refresh=2), 1, 8)
    passes = ("forward", "backward")
    return {fresh: sum(v for k, v in account.stages(fresh)[0].items() if k not in passes) for fresh in (False, True)}
