"""How parameters without curvature train: a direction without scale, stretched to the size of the parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from natgrad.layers.base import Layer, real_type


class Fallback(Protocol):
    """A direction from gradients alone."""

    @property
    def name(self) -> str: ...

    def allocate(self, layer: Layer, state: dict[str, Any]) -> None: ...

    def direction(self, state: dict[str, Any], gradient: Tensor, momentum: float) -> Tensor: ...


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

    def direction(self, state: dict[str, Any], gradient: Tensor, momentum: float) -> Tensor:
        first, second = state["adam_first"], state["adam_second"]
        state["adam_count"] += 1
        count = int(state["adam_count"])
        first.lerp_(gradient, 1 - momentum)
        second.lerp_(gradient.square(), 1 - self.second)
        unbiased = first / (1 - momentum**count), second / (1 - self.second**count)
        return unbiased[0] / (unbiased[1].sqrt() + self.eps)


adam = Adam()


@dataclass(frozen=True)
class PlainGradient:
    """The gradient itself, where a rule takes parameters without curvature into its own hands."""

    name: str = "plain gradient"

    def allocate(self, layer: Layer, state: dict[str, Any]) -> None:
        """Keep nothing."""

    def direction(self, state: dict[str, Any], gradient: Tensor, momentum: float) -> Tensor:
        return gradient


plain_gradient = PlainGradient()
