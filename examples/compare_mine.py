"""A task, a network and an optimizer of one's own in the comparison, without touching the package:

natgrad compare examples/compare_mine.py:TASK --optimizers SGD SPNGD examples/compare_mine.py:SIGNS
"""

import torch
from torch import nn

from natgrad_lab.compare import Contender, LogUniform, Profile, Task
from natgrad_lab.data import Digits
from natgrad_lab.models import UserModel
from natgrad_lab.train.optimizers import Anybodys, Sgd
from natgrad_lab.train.recipe import Recipe


class Signs(torch.optim.Optimizer):
    def __init__(self, params, lr=0.01, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.sub_(mean.lerp_(p.grad, 1 - group["momentum"]).sign(), alpha=group["lr"])


def network(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[1] * shape[2], 64), nn.Tanh(), nn.Linear(64, classes))


SIGNS = Contender("Signs", "first-order", Anybodys(0.01, f"{__file__}:Signs"), {"lr": LogUniform(1e-4, 0.1)})
RECIPE = Recipe(Digits(), UserModel(f"{__file__}:network"), Sgd())
QUICK = Profile(("SGD", "SPNGD"), batch=(479,), trials=4, half=False)
STEPS = ((128, 40), (479, 16))  # samples in a batch, steps
TASK = Task("digits-mlp", "digits on two layers", RECIPE, STEPS, full=10, targets=(0.9,), profiles={"quick": QUICK})
