"""How parameters without curvature train: a direction without scale, stretched to the size of the parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from natgrad.layers.layer import Layer, real_type
from natgrad.optim.segments import Segment


class Fallback(Protocol):
    """A direction from gradients alone."""

    @property
    def name(self) -> str: ...

    def allocate(self, layer: Layer, state: dict[str, Any]) -> None: ...

    def direction(self, segment: Segment) -> Tensor:
        """The direction [n] of a segment's parameters."""
        ...


@runtime_checkable
class Recalls(Fallback, Protocol):
    """A fallback that can make its last direction again from what it keeps, so that nobody has to keep that too."""

    def again(self, segment: Segment) -> Tensor:
        """The direction [n] that `direction` gave in these parameters' last step."""
        ...


@dataclass(frozen=True)
class Adam:
    """Adam's direction m / (sqrt(v) + eps) (Kingma and Ba 2015, Algorithm 1), its first moment with our momentum.

    Natural gradients and Adam's directions have unlike scales, so one lr cannot serve both as they are: the direction
    is stretched to the norm of its parameter, as LAMB does (You et al. 2020), whatever `length` the others take.
    """

    second: float = 0.99
    eps: float = 1e-8
    name: str = "adam"

    def allocate(self, layer: Layer, state: dict[str, Any]) -> None:
        weight = layer.parameters[0]
        for key in ("first", "second"):
            state[f"adam_{key}"] = torch.zeros(layer.shape, dtype=real_type(weight), device=weight.device)
        state["adam_count"] = torch.tensor(0)

    def direction(self, segment: Segment) -> Tensor:
        first, second = segment.state["adam_first"], segment.state["adam_second"]
        momentum = segment.group["momentum"]
        counts = segment.state["adam_count"] + 1
        segment.state["adam_count"] = counts
        first.lerp_(segment.gradient, 1 - momentum)
        limit = torch.finfo(second.dtype).max  # a square that is infinite would stay
        second.lerp_(segment.gradient.square().clamp_max_(limit), 1 - self.second)
        return self._formed(segment, momentum, counts)

    def again(self, segment: Segment) -> Tensor:
        momentum = segment.group.get("momentum_last", segment.group["momentum"])
        return self._formed(segment, momentum, segment.state["adam_count"].clamp_min(1))

    def _formed(self, segment: Segment, momentum: float, counts: Tensor) -> Tensor:
        """The direction by the moments as they are, after so many steps of each layer."""
        first, second = segment.state["adam_first"], segment.state["adam_second"]
        left, right = (corrections(segment, decay, counts) for decay in (momentum, self.second))
        return first / left / ((second / right).sqrt() + self.eps)


def corrections(segment: Segment, decay: float, counts: Tensor) -> Tensor:
    """1 - decay^count, by which a running mean that began at zero is too small: a scalar, or a vector [n]."""
    found = 1 - decay**counts
    alike = len({cell.numbers["adam_count"] for cell in segment.cells}) == 1
    return found[0] if alike else segment.spread(found.to(segment.gradient))


adam = Adam()
"""Adam's direction with a second moment of 0.99, the default fallback."""


@dataclass(frozen=True)
class PlainGradient:
    """The gradient itself, where a rule takes parameters without curvature into its own hands."""

    name: str = "plain gradient"

    def allocate(self, layer: Layer, state: dict[str, Any]) -> None:
        """Keep nothing."""

    def direction(self, segment: Segment) -> Tensor:
        return segment.gradient


plain_gradient = PlainGradient()
