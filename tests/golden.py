"""What twenty steps of every optimizer end with, on 1, 2 and 4 ranks, in double precision: kept in golden.json.

    python tests/golden.py          write the values anew (where a formula was changed on purpose)
    python tests/golden.py --show   print the largest relative differences from what is kept

A change of structure must not move them. Weights and samples are made of sines, not drawn.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import natgrad
from natgrad.optim import KLClip, LayerBlocks, Momentum
from natgrad.parallel import run_threads

FILE = Path(__file__).with_suffix(".json")
RANKS = (1, 2, 4)
STEPS = 20


class Net(nn.Module):
    """Layers of one shape twice, groups, biases, norms of several widths, a parameter of no layer, a layer at rest."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.gain = nn.Parameter(torch.ones(4, 1, 1))
        self.inner, self.again = nn.Linear(16, 6), nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3, bias=False)
        self.other = nn.Linear(6, 3)

    def forward(self, x, other):
        x = F.relu(self.norms[0](self.stem(x)))
        x = x + F.relu(self.norms[1](self.one(x)))
        x = x + F.relu(self.norms[2](self.two(x)))
        x = F.avg_pool2d(self.grouped(x) * self.gain, 2).flatten(1)
        x = torch.tanh(self.inner(x))
        x = self.norm(x + torch.tanh(self.again(x)))
        return self.other(x) if other else self.head(x)


def filled(model):
    """The model with weights that no generator has drawn."""
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            waves = torch.sin(torch.arange(p.numel(), dtype=torch.float64) * (1.3 + k) + k).view_as(p)
            p.copy_(p * 0 + 1 + 0.1 * waves if p.dim() in (1, 3) else waves * (2 / p[0].numel()) ** 0.5)
    return model.double()


def batch(step, n=24):
    waves = torch.arange(n * 2 * 16, dtype=torch.float64).view(n, 2, 4, 4)
    x = torch.sin(waves * 0.7 + 3.1 * step) + torch.cos(waves * waves * 0.01 + step)
    return x, torch.stack([x[:, 0, 0].sum(1), x[:, 1, :, 0].sum(1), x[:, 1, 2].sum(1)], 1).argmax(1)


def groups(model):
    """No decay for vectors, another rate for the head."""
    named = dict(model.named_parameters())
    vectors = [p for p in named.values() if p.dim() == 1]
    rest = [p for name, p in named.items() if p.dim() != 1 and not name.startswith("head")]
    return [
        {"params": rest, "weight_decay": 0.01},
        {"params": vectors, "weight_decay": 0.0},
        {"params": [model.head.weight], "lr": 0.03, "damping": 0.02},
    ]


def spngd(**options):
    given = {"lr": 0.02, "momentum": 0.7, "damping": 3e-2, "length": natgrad.plain, **options}
    return lambda model, world: natgrad.SPNGD(model, world=world, **given)


def seng(**options):
    given = {"lr": 0.05, "momentum": 0.9, "damping": 0.5, "refresh": 3, "length": natgrad.plain, **options}
    return lambda model, world: natgrad.SENG(model, world=world, **given)


def nlcg(**options):
    given = {"lr": 0.05, "step": natgrad.Scheduled(feedback=None), **options}
    return lambda model, world: natgrad.NLCG(model, world=world, **given)


COUPLED = Momentum(decoupled=False)  # as the releases decay

CASES = {
    "spngd": spngd(),
    "spngd, trust": spngd(length=natgrad.trust, momentum=0.5),
    "spngd, predicted change": spngd(length=KLClip(1e-3)),
    "spngd, measured change": lambda model, world: natgrad.SPNGD(model, 0.1, damping=1e-2, world=world),
    "spngd, groups": lambda model, world: natgrad.SPNGD(
        model, 0.02, params=groups(model), length=natgrad.plain, rule=COUPLED, damping=3e-2, world=world
    ),
    "spngd, rescaled displacements": spngd(rescale="always", rule=Momentum(displaced=True)),
    "spngd, running means, all rows": spngd(rows_per_dim=None, ema_decay=0.5, refresh=2),
    "spngd, clipped, decay": spngd(max_norm=0.5, weight_decay=0.05, rule=COUPLED),
    "spngd, sampled labels": spngd(fisher="sampled"),
    "spngd, directions": spngd(gather="directions"),
    "spngd, eigenvectors, full norms": spngd(
        curvature=LayerBlocks(natgrad.curvature.EigenKronecker, natgrad.curvature.Full)
    ),
    "kfac": lambda model, world: natgrad.KFAC(model, 0.02, damping=3e-2, length=natgrad.plain, world=world),
    "kfac, measured change": lambda model, world: natgrad.KFAC(model, 0.1, damping=1e-2, world=world),
    "seng": seng(),
    "seng, measured change": lambda model, world: natgrad.SENG(model, 0.1, damping=0.2, world=world),
    "seng, one block": seng(block="network", sketch=None),
    "seng, improved": seng(columns="improved"),
    "nlcg": nlcg(),
    "nlcg, loss": lambda model, world: natgrad.NLCG(model, 0.1, world=world),
    "nlcg, faithful": lambda model, world: natgrad.NLCG(model, 0.1, mode="faithful", weight_decay=0.01, world=world),
    "nlcg, second moment": nlcg(preconditioner=natgrad.SecondMoment(), lr=0.0005, beta=natgrad.optim.polak_ribiere),
    "nlcg, curvature": nlcg(preconditioner=natgrad.spngd_blocks, beta=natgrad.optim.dai_yuan),
    "nlcg, curvature step": lambda model, world: natgrad.NLCG(
        model,
        preconditioner=natgrad.spngd_blocks,
        beta=natgrad.optim.polak_ribiere,
        step=natgrad.CurvatureStep(),
        world=world,
    ),
}


def trained(build, world):
    """The final parameters of one rank."""
    model = filled(Net())
    optimizer = build(model, world)
    for step in range(STEPS):
        x, y = (part.chunk(world.size)[world.rank] for part in batch(step))
        output = model(x, step % 7 == 5)
        if getattr(optimizer.engine, "sampled", False):
            optimizer.sample(output)
        loss = F.cross_entropy(output, y)
        loss.backward()
        if isinstance(optimizer, natgrad.NLCG) and isinstance(optimizer.search, natgrad.CurvatureStep):
            optimizer.step(forward=lambda x=x, step=step: model(x, step % 7 == 5))
        elif isinstance(optimizer, natgrad.NLCG) and optimizer.search.feedback is not None:
            optimizer.step(loss=loss)
        else:
            optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def marks(parameters):
    """The norm of every parameter and its product with a wave."""
    found = {}
    for name, p in parameters.items():
        wave = torch.cos(torch.arange(p.numel(), dtype=torch.float64) * 0.37)
        found[name] = [p.norm().item(), (p.flatten() @ wave).item()]
    return found


def made(case, ranks):
    """What a case ends with on so many ranks, the same on all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = [
            marks(found) for found in run_threads(ranks, lambda world: trained(CASES[case], world), gradients="local")
        ]
    assert all(found == results[0] for found in results)
    return results[0]


def difference(found, kept):
    """The largest difference of marks, over a parameter's norm."""
    return max(abs(a - b) / kept[name][0] for name in kept for a, b in zip(found[name], kept[name]))


def main():
    torch.set_num_threads(1)
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    fresh = {f"{case}, {ranks}": made(case, ranks) for case in CASES for ranks in RANKS}
    if "--show" in sys.argv:
        for name, found in fresh.items():
            print(f"{name:45} {difference(found, kept[name]):.1e}")
    else:
        FILE.write_text(json.dumps(fresh, indent=0) + "\n")


if __name__ == "__main__":
    main()
