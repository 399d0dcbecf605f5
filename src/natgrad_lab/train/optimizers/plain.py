"""Optimizers that know no curvature: the baselines."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from natgrad.parallel import World
from natgrad_lab.train.optimizers.settings import Settings, alone, positive


@dataclass(frozen=True)
class Sgd(Settings):
    """SGD with momentum, the baseline."""

    momentum: float = 0.9
    """Share of the last step that is repeated."""
    nesterov: bool = False
    """Look ahead along the momentum before measuring the gradient's effect."""
    weight_decay: float = 0.0
    """Strength of the L2 penalty."""

    @property
    def cuttable(self) -> bool:
        return True

    def build(self, model: nn.Module, world: World) -> Optimizer:
        positive("lr", self.lr)
        if self.nesterov and self.momentum <= 0:
            raise ValueError(f"nesterov needs momentum > 0, not {self.momentum:g}; set --optimizer.momentum 0.9")
        return alone(
            torch.optim.SGD(
                model.parameters(),
                self.lr,
                momentum=self.momentum,
                nesterov=self.nesterov,
                weight_decay=self.weight_decay,
            ),
            model,
            world,
        )


@dataclass(frozen=True)
class AdamW(Settings):
    """Adam with decoupled weight decay."""

    lr: float = 0.01
    """Learning rate at the start; the schedule multiplies it."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the averages of the gradient and of its square."""
    weight_decay: float = 0.0
    """Strength of the decoupled weight decay."""

    @property
    def cuttable(self) -> bool:
        return True

    def build(self, model: nn.Module, world: World) -> Optimizer:
        positive("lr", self.lr)
        optimizer = torch.optim.AdamW(model.parameters(), self.lr, betas=self.betas, weight_decay=self.weight_decay)
        return alone(optimizer, model, world)


@dataclass(frozen=True)
class RmsProp(Settings):
    """The gradient over the root of its running mean square, with momentum (Hinton's lecture 6e)."""

    decay: float = 0.9
    """Share of the old mean square that is kept."""
    momentum: float = 0.9
    """Share of the last step that is repeated."""
    epsilon: float = 1e-8
    """Added to the root."""
    weight_decay: float = 0.0
    """Strength of the L2 penalty."""

    @property
    def cuttable(self) -> bool:
        return True

    def build(self, model: nn.Module, world: World) -> Optimizer:
        positive("lr", self.lr)
        optimizer = torch.optim.RMSprop(
            model.parameters(),
            self.lr,
            alpha=self.decay,
            eps=self.epsilon,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
        )
        return alone(optimizer, model, world)
