"""How far a step goes, given its direction: a factor a layer, functions of (steps, world)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from natgrad.layers.base import Layer
from natgrad.parallel import World

LEAST_WEIGHT = 0.1  # of a healthy weight: a layer that starts at zero must be able to leave it


@dataclass
class Step:
    """What one layer is about to do, at its owner. All tensors have the layer's form [b, o, i].

    `groups` are the param_groups of the layer's parameters, in their order.
    """

    layer: Layer
    gradient: Tensor
    precondition: Callable[[Tensor], Tensor]
    state: dict[str, Any]
    groups: list[dict[str, Any]]
    direction: Tensor
    curved: bool = True  # False: the fallback's direction, as long as its weight
    cell: Any = None
    kept: float = 0.0  # by this the rule has multiplied its past directions before it added this step's
    fresh: bool = False  # the gradient is the mean of rows that were measured in this very step
    past: Tensor | None = None  # the direction of the step before, where somebody keeps it
    met: Tensor | None = None  # its product with this step's gradient
    terms: float = 1.0  # the gradient is that of the mean loss times so many: of a sum over a rank's samples

    @property
    def lr(self) -> float:
        return self.groups[0]["lr"]

    def weight(self) -> Tensor:
        """The layer's weights in its form."""
        return self.layer.pack([p.detach() for p in self.layer.parameters])


def rate_of(group: dict[str, Any], key: str) -> float:
    """The learning rate "lr", that of the last step ("lr_last") or of the first one ("lr_first"), of a group."""
    return group.get(key, group["lr"])


Natural = Callable[["Sequence[Step]", Sequence[Tensor]], "list[Tensor]"]
"""natural(steps, gradients) -> the damped natural gradients of these gradients [b, o, i], step by step."""


def layerwise(steps: Sequence[Step], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Natural gradients of layers that know nothing of each other."""
    return [step.precondition(gradient) for step, gradient in zip(steps, gradients)]


Length = Callable[[Sequence[Step], World], "list[Tensor | float]"]
"""length(steps, world) -> a factor a layer. See Remembers for lengths that learn."""


@runtime_checkable
class Keeps(Protocol):
    """A length that keeps tensors in the state of each layer's weight."""

    def allocate(self, layer: Layer, state: dict[str, Any]) -> None:
        """Make them for one layer."""


@runtime_checkable
class Remembers(Keeps, Protocol):
    """A length that learns from step to step.

    The optimizer keeps its `numbers` in the param_groups, where they are the same on every rank and part of every
    checkpoint.
    """

    numbers: ClassVar[Mapping[str, float]]
    """What it remembers, by name, as it is at the start."""
    sums: ClassVar[int]
    """How many numbers it adds up over ranks in a step."""
    looks_back: ClassVar[bool]
    """Whether it is given each layer's last direction, and parameters without curvature too."""

    def look_back(self, steps: Sequence[Step]) -> None:
        """See what came of the last step, before the rule gives new directions."""

    def lengths(self, steps: Sequence[Step], world: World, numbers: dict[str, float]) -> list[float]:
        """A factor a layer; `numbers` are changed alike on all ranks. Every rank calls it in every step."""
        ...


def plain(steps: Sequence[Step], world: World) -> list[Tensor | float]:
    """The direction as it is."""
    return [1.0] * len(steps)


def trust(steps: Sequence[Step], world: World) -> list[Tensor | float]:
    """|w| / |d|: the step is lr times the norm of the layer's weight (You et al. 2017, eq. 6, without its constant)."""
    return [trust_ratio(step) for step in steps]


def trust_ratio(step: Step) -> Tensor:
    """|w| / |d| of one layer, with a floor for layers that start at or near zero."""
    weight, direction = torch.linalg.vector_norm(step.weight()), torch.linalg.vector_norm(step.direction)
    floor = LEAST_WEIGHT * step.layer.scale * math.sqrt(step.layer.shape.numel)
    weight = weight.to(direction).clamp_min(floor)
    return torch.where(direction > 0, weight / direction.clamp_min(torch.finfo(direction.dtype).tiny), 0)
