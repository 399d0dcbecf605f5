"""Jobs that are saved and taken up again: recipes, settings and steps that tests of checkpoints share."""

from dataclasses import replace

import torch

from natgrad_lab.data import Digits, Regularisation
from natgrad_lab.models import CifarResNet
from natgrad_lab.schedules import Exponential
from natgrad_lab.train import checkpoint
from natgrad_lab.train.loop import steps
from natgrad_lab.train.optimizers import AdamW, KFac, Nlcg, Seng, Sgd, SpNgd
from natgrad_lab.train.recipe import Recipe
from natgrad_lab.train.saver import Saver

CONV = Recipe(
    Digits(),
    CifarResNet(8, (4, 6, 8)),
    Sgd(),
    regularisation=Regularisation(mixup=0.4, erase=0.5, per_sample=True),
    average=0.9,
    batch=60,
    micro_batch=20,
    steps=9,
    evaluate_every=2,
    norm_samples=64,
)
SETTINGS = [
    Sgd(lr=0.1, nesterov=True, weight_decay=1e-3),
    AdamW(),
    SpNgd(lr=0.05, refresh=None, ema_decay=0.5, rescale="always", coefficient="tied", displaced=True),
    SpNgd(lr=0.05, weights_wire="bfloat16", rows_per_dim=None),
    SpNgd(lr=0.05, refresh=1, refresh_share=0.1),
    KFac(lr=0.05, refresh=2, inverse="eigen", gather="directions"),
    Seng(lr=0.1, refresh=3, samples=40),
    Seng(lr=0.1, refresh=3, samples=40, replicated=True, legacy=True, legacy_local=True),
    Nlcg(lr=0.1),
    Nlcg(lr=1.0, preconditioner="kronecker", step="curvature", beta="polak_ribiere"),
]
NAMES = ["sgd", "adamw", "spngd", "spngd-bf16", "spngd-budget", "kfac", "seng", "seng-local", "nlcg", "nlcg-kfac"]


def recipe_with(optimizer):
    damped = hasattr(optimizer, "damping") and not isinstance(optimizer, Nlcg)
    return replace(CONV, optimizer=optimizer, **({"damping_schedule": Exponential(0.5, 0.5)} if damped else {}))


def go_on(job, until):
    """Take steps, judging as a run does; return their losses."""
    losses = []
    for step in steps(job):
        losses.append(step.loss)
        if job.due(step.step):
            job.score()
        if step.step == until:
            break
    return losses


def saved(job, folder, tell=lambda *_, **__: None):
    saver = Saver(folder, job.world, keep=2, tell=tell)
    job.world.sum([torch.zeros(1)])  # nobody writes before rank 0 has cleared up
    saver.save(job)
    saver.finish()
    return folder / checkpoint.name_of(job.done)


def weights(job):
    return [p.detach().clone() for p in job.model.parameters()]


CURVED = [SETTINGS[k] for k in (2, 4, 5, 6, 8, 9)]
