"""What a recipe can name as its optimizer: frozen numbers, and how to build the optimizer from them.

A new optimizer is one more class here (or in any module that a recipe imports); the command line learns its
fields by itself. Optimizers that know nothing of ranks go through `alone`, which averages their gradients
before each step.
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

import natgrad
from natgrad.optim import lengths, rules
from natgrad.optim.rules import Momentum
from natgrad.parallel import Parcel, World
from natgrad.staleness import Adaptive

COEFFICIENTS = {"corrected": rules.corrected, "tied": rules.tied, "heavy_ball": rules.heavy_ball}
LENGTHS = {"plain": lengths.plain, "trust": lengths.trust, "predicted_change": lengths.predicted_change}


@dataclass(frozen=True)
class Settings:
    """The numbers of an optimizer; `build` makes one for a model on the ranks of a world."""

    lr: float = 0.1
    """Learning rate at the start; the schedule multiplies it."""

    def build(self, model: nn.Module, world: World) -> Optimizer:
        raise NotImplementedError(f"{type(self).__name__} does not say how to build its optimizer")


@dataclass(frozen=True)
class Sgd(Settings):
    """SGD with momentum, the baseline."""

    momentum: float = 0.9
    """Share of the last step that is repeated."""
    nesterov: bool = False
    """Look ahead along the momentum before measuring the gradient's effect."""
    weight_decay: float = 0.0
    """Strength of the L2 penalty."""

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

    def build(self, model: nn.Module, world: World) -> Optimizer:
        positive("lr", self.lr)
        optimizer = torch.optim.AdamW(model.parameters(), self.lr, betas=self.betas, weight_decay=self.weight_decay)
        return alone(optimizer, model, world)


@dataclass(frozen=True)
class SpNgd(Settings):
    """SP-NGD: natural gradient with Kronecker factors, refreshed when they have changed."""

    momentum: float = 0.9
    """Share of the last direction that is repeated."""
    damping: float = 1e-3
    """Added to the curvature before it is inverted, split between the two factors."""
    weight_decay: float = 0.0
    """Strength of the L2 penalty."""
    refresh: int | None = None
    """Measure every so many steps; None: each statistic when it has changed by more than `tolerance`."""
    tolerance: float = 0.1
    """Relative change of a statistic that counts as change, quoted at 4,096 measured samples."""
    samples: int | None = 8
    """Rows measured for each dimension of a statistic; None: every row."""
    length: Literal["plain", "trust", "predicted_change"] = "plain"
    """How far a step goes along its direction."""
    coefficient: Literal["corrected", "tied", "heavy_ball"] = "corrected"
    """Momentum as the learning rate falls: corrected keeps it, tied lets it fall alike (the paper)."""
    before: bool = False
    """Average gradients and precondition the average, instead of averaging preconditioned gradients."""
    rescale: Literal["always", "shrink"] | None = None
    """Hold each weight at the norm it had at initialisation (always, or only when it has grown)."""

    def build(self, model: nn.Module, world: World) -> Optimizer:
        return natgrad.SPNGD(
            model,
            self.lr,
            momentum=self.momentum,
            damping=self.damping,
            weight_decay=self.weight_decay,
            refresh=Adaptive(self.tolerance) if self.refresh is None else self.refresh,
            samples=self.samples,
            length=LENGTHS[self.length],
            rule=Momentum(self.before, COEFFICIENTS[self.coefficient]),
            rescale=self.rescale,
            world=world,
        )


@dataclass(frozen=True)
class KFac(Settings):
    """K-FAC: Kronecker factors averaged over time, refreshed every k steps."""

    momentum: float = 0.9
    """Share of the last step that is repeated."""
    damping: float = 1e-3
    """Added to the curvature before it is inverted, split between the two factors."""
    weight_decay: float = 0.0
    """Strength of the L2 penalty."""
    refresh: int = 10
    """Measure every so many steps."""
    decay: float = 0.95
    """Share of the old average that a refresh keeps."""
    samples: int | None = 8
    """Rows measured for each dimension of a statistic; None: every row."""
    length: Literal["plain", "trust", "predicted_change"] = "plain"
    """How far a step goes along its direction."""

    def build(self, model: nn.Module, world: World) -> Optimizer:
        return natgrad.KFAC(
            model,
            self.lr,
            momentum=self.momentum,
            damping=self.damping,
            weight_decay=self.weight_decay,
            refresh=self.refresh,
            decay=self.decay,
            samples=self.samples,
            length=LENGTHS[self.length],
            world=world,
        )


def alone(optimizer: Optimizer, model: nn.Module, world: World) -> Optimizer:
    """Make an optimizer that knows of one rank begin as rank 0 does and step by the mean gradient."""
    world.gather([Parcel(tensor.detach(), 0) for tensor in (*model.parameters(), *model.buffers())])
    seconds = {"messages": 0.0}

    def average(*_: object) -> None:
        began = time.perf_counter()
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        world.mean([parameter.grad for parameter in parameters if parameter.grad is not None], "gradients")
        seconds["messages"] += time.perf_counter() - began

    if world.size > 1:
        optimizer.register_step_pre_hook(average)
        vars(optimizer)["seconds"] = seconds
    return optimizer


def positive(name: str, value: float) -> None:
    """Refuse zero, negative numbers and what is no number."""
    if not value > 0 or value == float("inf"):
        raise ValueError(f"{name}={value:g} must be a positive number; set --optimizer.{name}")
