"""Where a step goes, given gradients and curvature: rules of (segments, natural, world) that fill in directions.

A rule keeps its vectors in the state of each layer's weight, in the layer's form [b, o, i]; a segment has those of its
layers behind one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from natgrad.layers.layer import Layer, real_type
from natgrad.optim.segments import Segment
from natgrad.optim.step_size import Natural, rate_of
from natgrad.parallel import World

Coefficient = Callable[[float, float, float, float], float]
"""coefficient(momentum, lr, last lr, first lr) -> what the buffer of directions is multiplied by."""


def corrected(momentum: float, lr: float, last: float, first: float) -> float:
    """The same momentum at every learning rate.

    In terms of displacements it is momentum * lr / last, the correction of Goyal et al. (2017, section 3) that
    SP-NGD's release applies.
    """
    return momentum


def tied(momentum: float, lr: float, last: float, first: float) -> float:
    """Momentum that falls with the learning rate, m(e) = m0 / eta0 * eta(e) on displacements (SP-NGD eq. 22-23).

    While a learning rate warms up, the first one is not the largest: momentum stays what was asked for.
    """
    return momentum * min(1.0, last / first) if first > 0 else momentum


def heavy_ball(momentum: float, lr: float, last: float, first: float) -> float:
    """The same momentum on displacements, whatever the learning rate does (Polyak 1964)."""
    return momentum * last / lr if lr > 0 else 0.0


class Rule(Protocol):
    """A rule of direction. One that has `moved` too hears of weights that were rescaled (see Momentum); one that has
    `takes_loose = True` is given the parameters without curvature too, which else train by the fallback. One that keeps
    each layer's last direction in its state says under which name (`keeps_directions`). With
    `leaves_weights = True` directions go into `.grad`. With `decoupled = True` weights decay beside the directions;
    other rules add the decay themselves, if they want any.
    """

    def allocate(self, layer: Layer, state: dict[str, Any]) -> None:
        """Make the rule's tensors for one layer: in its shape, or numbers [], with which every layer is a segment."""

    def __call__(self, segments: Sequence[Segment], natural: Natural, world: World) -> None:
        """Fill in every segment's direction. `natural` is to be called once, on every rank."""


def takes_loose(rule: Rule) -> bool:
    """Whether a rule directs the parameters without curvature."""
    return getattr(rule, "takes_loose", False)


def keeps_numbers(rule: Rule, layers: Iterable[Layer]) -> bool:
    """Whether a rule keeps numbers of each layer, such as how many steps it has made."""
    least = min(layers, key=lambda layer: layer.numel, default=None)
    if least is None:
        return False
    state: dict[str, Any] = {}
    rule.allocate(least, state)
    return any(isinstance(value, torch.Tensor) and value.dim() == 0 for value in state.values())


def leaves_weights(rule: Rule) -> bool:
    """Whether directions become the parameters' gradients, for another optimizer to make the step."""
    return getattr(rule, "leaves_weights", False)


def decouples(rule: Rule) -> bool:
    """Whether weights decay beside a rule's directions, and not as a part of them."""
    return getattr(rule, "decoupled", False)


def directions_kept(rule: Rule) -> str | None:
    """The name under which a rule keeps a layer's last direction in its state, or None."""
    return getattr(rule, "keeps_directions", None)


@dataclass(frozen=True)
class Momentum:
    """A buffer of gradients that is then preconditioned (before=True), or of preconditioned gradients (False).

    `before=False` is SP-NGD's order (eq. 23); momentum on gradients sees today's curvature in all of its past.
    `displaced`: what is repeated is the weight's whole last displacement w(t) - w(t-1), rescaling included, as eq. 23
    reads; the release's buffer leaves it out.

    `decoupled`: weight decay takes lr * weight_decay of each weight and nothing else, as in AdamW (Loshchilov and
    Hutter 2019): momentum does not repeat it, no length shortens it, and the fallback does not stretch it. False adds
    the decay to the preconditioned gradient (to the fallback's direction), as the releases do: it is not curved, but
    is repeated, shortened and stretched with the direction.

    Args:
        before: average gradients and precondition their average, instead of averaging preconditioned gradients.
        coefficient: momentum as the learning rate changes: corrected keeps it, tied lets it fall alike (SP-NGD),
            heavy_ball keeps it on displacements, or a Coefficient of yours.
        displaced: repeat a weight's whole last displacement, rescaling included (SP-NGD's paper), not the direction.
        decoupled: decay weights beside the direction, as AdamW does; False: as a part of the direction.

    """

    before: bool = False
    coefficient: Coefficient = corrected
    displaced: bool = False
    decoupled: bool = True

    def __post_init__(self):
        if self.before and self.displaced:
            raise ValueError("Momentum(before=True, displaced=True): gradients have no displacement; leave one out")

    def allocate(self, layer: Layer, state: dict[str, Any]) -> None:
        weight = layer.parameters[0]
        state["momentum"] = torch.zeros(layer.shape, dtype=real_type(weight), device=weight.device)

    def __call__(self, segments: Sequence[Segment], natural: Natural, world: World) -> None:
        for segment in segments:
            segment.keep = self.constant(segment.group)
            segment.state["momentum"].mul_(segment.keep)
            if self.before:
                segment.state["momentum"].add_(segment.gradient)
        curved = natural(segments, [s.state["momentum"] if self.before else s.gradient for s in segments])
        for segment, direction in zip(segments, curved):
            if not self.decoupled:
                direction = segment.add_weights(direction)
            segment.direction = direction if self.before else segment.state["momentum"].add_(direction)

    def constant(self, group: dict[str, Any]) -> float:
        """What a group's buffer of directions is multiplied by in the coming step."""
        last, first = rate_of(group, "lr_last"), group.get("initial_lr", rate_of(group, "lr_first"))
        return self.coefficient(group["momentum"], group["lr"], last, first)

    @property
    def keeps_directions(self) -> str | None:
        """The buffer, where it holds the last direction as it was."""
        return None if self.before or self.displaced else "momentum"

    def moved(self, layer: Layer, state: dict[str, Any], direction: torch.Tensor) -> None:
        """Take over a weight's displacement over -lr where it was not the direction alone."""
        if self.displaced:
            state["momentum"].copy_(layer.pack([direction, *layer.unpack(state["momentum"])[1:]]))
