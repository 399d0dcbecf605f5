"""How far a step goes, given its direction: a factor a layer, functions of (steps, world)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from natgrad.layers.base import Layer, real_type
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
    curved: bool = True  # False: the fallback's direction, which has no natural length
    cell: Any = None
    kept: float = 0.0  # by this the rule has multiplied its past directions before it added this step's
    fresh: bool = False  # the gradient is the mean of rows that were measured in this very step

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
"""length(steps, world) -> a factor a layer."""


@runtime_checkable
class Keeps(Protocol):
    """A length that keeps tensors in the state of each layer's weight."""

    def allocate(self, layer: Layer, state: dict[str, Any]) -> None:
        """Make them for one layer."""


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


@dataclass(frozen=True)
class PredictedChange:
    """All layers together shortened so that lr^2 d^T F d, twice the change of the output (KL), is at most
    max(least, per_sample * n) and never more than limit, with n the samples of a step on all ranks, as they were last
    counted.

    The KL clip of Ba, Grosse and Martens (2017, section 5.3) takes d . g for d^T F d, which holds for one natural
    gradient. A direction that repeats others, d = sum m^k F^-1 g_k, has F d = h = sum m^k g_k as long as F stands
    still: gradients are summed as their directions are, and d . h is taken (ours). d . g is by 1/(1 - m) too small
    while gradients agree, and nothing once d has overshot, just when a step should be held back. One number travels.

    The bound that grows with the batch is ours too: the noise of a mean over n samples has the covariance F / n, so
    its share of d^T F d falls as 1/n, and a larger batch may go as much further as it is surer. `least` is what small
    batches may change all the same, as their many steps average the noise; `limit` is how far the quadratic model is
    trusted whatever the batch. per_sample None: `limit` alone.
    """

    limit: float = 0.1
    per_sample: float | None = 2e-5
    least: float = 0.01

    def __post_init__(self):
        if not self.limit > 0:
            raise ValueError(f"PredictedChange(limit={self.limit}): give a change above 0")
        if self.per_sample is not None and not self.per_sample > 0:
            raise ValueError(
                f"PredictedChange(per_sample={self.per_sample}): give a change above 0, or None for `limit` alone"
            )
        if not self.least >= 0:
            raise ValueError(f"PredictedChange(least={self.least}): give a change, or 0 for none")

    def bound(self, samples: float) -> float:
        """The largest lr^2 d^T F d for a step of so many samples; 0 of them: their number is not known."""
        if self.per_sample is None or not samples:
            return self.limit
        return min(self.limit, max(self.least, self.per_sample * samples))

    def allocate(self, layer: Layer, state: dict[str, Any]) -> None:
        """Make room for the sum of gradients of one layer."""
        weight = layer.parameters[0]
        state["gradients"] = torch.zeros(layer.shape, dtype=real_type(weight), device=weight.device)

    def __call__(self, steps: Sequence[Step], world: World) -> list[Tensor | float]:
        change = torch.zeros(1, dtype=torch.float64)
        if steps:  # one wait for the device
            sums = [step.state["gradients"].mul_(step.kept).add_(step.gradient) for step in steps]
            squares = [s.lr**2 * torch.sum(s.direction * h, dtype=torch.float64) for s, h in zip(steps, sums)]
            change += torch.stack(squares).sum().cpu()
        world.over_owners([change], "scalars")
        bound = self.bound(steps[0].groups[0].get("batch", 0)) if steps else 1.0
        factor = min(1.0, math.sqrt(bound / max(abs(change.item()), 1e-300)))
        return [factor] * len(steps)


predicted_change = PredictedChange()
