"""Runs of the trainer whose model is cut over ranks: what threads and processes are asked alike."""

import gc
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
from torch import nn
from torch._dynamo.utils import counters

from checkpoints import saved
from in_parts import full, whole
from natgrad.parallel import World
from natgrad_lab.data import Digits
from natgrad_lab.models import Architecture
from natgrad_lab.train.loop import build, prepare, steps
from natgrad_lab.train.optimizers import AdamW, KFac, Nlcg, RmsProp, Seng, Sgd, SpNgd
from natgrad_lab.train.recipe import Recipe
from natgrad_lab.train.run import Options, run
from natgrad_lab.train.sharded import Sharded
from natgrad_lab.train.state import restore


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.grow, self.shrink = nn.LayerNorm(width), nn.Linear(width, 15), nn.Linear(15, width)

    def forward(self, x):
        return x + self.shrink(torch.tanh(self.grow(self.norm(x))))


class Blocks(nn.Module):
    """Convolutions, one of them in groups, blocks, a parameter of its own: sides of 6, 7, 10 and 15."""

    def __init__(self):
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(1, 6, 3, stride=2), nn.Conv2d(6, 6, 3, groups=2)
        self.scale = nn.Parameter(torch.ones(6))
        self.enter, self.head = nn.Linear(6, 7), nn.Linear(7, 10)
        self.blocks = nn.ModuleList(Block(7) for _ in range(2))

    def forward(self, x):
        hidden = self.grouped(torch.tanh(self.conv(x.double()))).flatten(2).mean(-1) * self.scale
        hidden = torch.tanh(self.enter(hidden))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


@dataclass(frozen=True)
class InBlocks(Architecture):
    """Blocks in float64."""

    def build(self, shape, classes):
        return Blocks().double()


EXACT = {
    "sgd": Sgd(lr=0.05, nesterov=True, weight_decay=1e-3),
    "adamw": AdamW(),
    "rmsprop": RmsProp(lr=1e-3),
    "spngd": SpNgd(lr=0.05, refresh=2, rows_per_dim=None, max_norm=1.0),
    "kfac": KFac(lr=0.05, refresh=2, rows_per_dim=None, inverse="eigen"),
    "seng": Seng(lr=0.1, refresh=2, samples=None, sketch=None),
    "nlcg": Nlcg(lr=0.1),
}
RECIPE = Recipe(Digits(), InBlocks(), Sgd(), batch=32, micro_batch=12, steps=4, evaluate_every=2, average=0.9)


def train(world, recipe, splits, sharded=None, folder=None, start=None):
    """Train from a checkpoint or from the start, to the end or to a checkpoint at half of the way.

    Weights, running means, evaluations, losses, where the checkpoint is.
    """
    job = prepare(recipe, world, splits, build(recipe, world, torch.device("cpu"), sharded))
    if start is not None:
        restore(job, start)
    scores, losses, path = [], [], None
    for step in steps(job):
        losses.append(step.loss)
        if job.due(step.step):
            scores.append(job.score().loss)
        if folder is not None and 2 * step.step == job.steps:
            path = saved(job, folder)
            break
    means = [whole(mean).flatten() for mean in job.average.means]
    return full(job.model), torch.cat(means) if means else None, scores, losses, path


RUN = replace(RECIPE, optimizer=EXACT["spngd"])


def command(folder, ranks, resume=False):
    """What `natgrad train --shard` does on every rank; 4 ranks are 2 replicas. The weights that it has written."""
    options = Options(
        out=f"{folder}/run", device="cpu", shard=ranks > 1, replicas=max(1, ranks // 2), save_every=2, resume=resume
    )
    world = World()
    assert run("sharded", RUN, options, world) == "finished"
    world.sum([torch.zeros(1)])  # rank 0 has written
    return torch.cat([w.flatten() for w in torch.load(f"{folder}/run/model.pt").values()])


def compiled(ranks):
    """A run's results, and those of the same run with its blocks compiled, with the graphs that each has compiled.

    Without inductor, whose compiler takes minutes: what ranks bring into question is which graphs there are.
    """
    found, traced = [], partial(torch.compile, backend="aot_eager")
    for chosen in (False, True):
        gc.collect()  # an optimizer that still watches would have all run eagerly
        torch._dynamo.reset()
        counters.clear()
        recipe = replace(RUN, compile=chosen)
        with mock.patch.object(torch, "compile", traced):
            results = train(World(), recipe, Digits().load(), Sharded(max(1, ranks // 2)))
        found.append((results[:4], counters["stats"]["unique_graphs"]))
    return found


__all__ = ["EXACT", "RECIPE", "RUN", "Sharded", "command", "compiled", "train"]
