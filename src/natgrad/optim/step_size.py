"""How far a step goes, given its direction: a factor a layer, functions of (segments, world)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from natgrad.layers.layer import Layer
from natgrad.optim.segments import Segment
from natgrad.parallel import World


def rate_of(group: dict[str, Any], key: str) -> float:
    """The learning rate "lr", that of the last step ("lr_last") or of the first one ("lr_first"), of a group."""
    return group.get(key, group["lr"])


Natural = Callable[[Sequence[Segment], Sequence[Tensor]], "list[Tensor]"]
"""natural(segments, gradients) -> the damped natural gradients of these gradients [n], segment by segment."""


def layerwise(segments: Sequence[Segment], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Natural gradients of layers that know nothing of each other."""
    return [segment.precondition(gradient) for segment, gradient in zip(segments, gradients)]


StepSize = Callable[[Sequence[Segment], World], "list[Tensor | float]"]
"""length(segments, world) -> for every segment a factor, or one for each of its layers [layers].

See Remembers for lengths that learn.
"""


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

    def look_back(self, segments: Sequence[Segment]) -> None:
        """See what came of the last step, before the rule gives new directions."""

    def lengths(self, segments: Sequence[Segment], world: World, numbers: dict[str, Tensor]) -> list[Tensor]:
        """A factor a segment, on its device; `numbers` are replaced alike on all ranks.

        Every rank calls it in every step. All are scalars in double precision on the device, and nothing is read: the
        host hears them with the finite check of the next step. What is assigned to a name of `segment.state` that
        holds numbers [layers, ...] reaches the state then too.
        """
        ...


def hears_loss(length: StepSize | Remembers) -> bool:
    """Whether a loss that is told matters to a length: one that says `hears_loss = True`, and learns.

    Its `numbers` have "loss" too where a rank was told its loss: this rank's share of the mean loss over ranks and of
    the number of ranks that were told theirs [2]. Their sums over ranks are the mean loss, and 1 if all were.
    """
    return remembers(length) and getattr(length, "hears_loss", False)


_KINDS: dict[type, bool] = {}


def remembers(length: StepSize | Remembers) -> TypeGuard[Remembers]:
    """Whether a length learns from step to step. A Protocol takes long to look at its members, and does it once."""
    kind = type(length)
    if kind not in _KINDS:
        _KINDS[kind] = isinstance(length, Remembers)
    return _KINDS[kind]


def plain(segments: Sequence[Segment], world: World) -> list[Tensor | float]:
    """The direction as it is."""
    return [1.0] * len(segments)


def trust(segments: Sequence[Segment], world: World) -> list[Tensor | float]:
    """|w| / |d|: the step is lr times the norm of the layer's weight (You et al. 2017, eq. 6, without its constant)."""
    return [trust_ratios(segment) for segment in segments]


def trust_ratios(segment: Segment) -> Tensor:
    """|w| / |d| of each layer [layers], with a floor for layers that start at or near zero."""
    directions = segment.norms(segment.direction)
    weights = torch.maximum(segment.weight_norms().to(directions), segment.outline.floors)
    return torch.where(directions > 0, weights / directions.clamp_min(torch.finfo(directions.dtype).tiny), 0)
