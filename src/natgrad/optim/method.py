"""Method: the choices by which mean gradients become a step; an optimizer here is a set of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from natgrad.layers import Layer, UncurvedParameter
from natgrad.layers.layer import real_type
from natgrad.optim.conjugate import Conjugate
from natgrad.optim.directions import Momentum, Rule, directions_kept, leaves_weights, takes_loose
from natgrad.optim.fallback import Adam, Fallback, PlainGradient, Recalls
from natgrad.optim.kl_clip import KLClip, MeasuredChange
from natgrad.optim.rescale import Rescale
from natgrad.optim.step_size import Keeps, Natural, Remembers, StepSize, layerwise, plain, trust


@dataclass
class Method:
    """What a step is made by.

    rule: directions from natural gradients. length: how far along them. fallback: directions of parameters without
    curvature. natural: natural gradients of layers, which may know of each other. gather: what owners send to all
    ranks. rescale: weights keep their norm. reduction: what the loss is over a rank's samples. probe: makes the
    directions of all parameters as long as they should be.
    """

    rule: Rule
    length: StepSize | Remembers
    fallback: Fallback
    gather: Literal["weights", "directions"] = "weights"
    rescale: Rescale | None = None
    reduction: Literal["mean", "sum"] = "mean"
    natural: Natural = layerwise
    probe: Callable[[dict[nn.Parameter, Tensor]], None] | None = None

    @property
    def looks_back(self) -> bool:
        """Whether the length learns from what the last step has done."""
        return isinstance(self.length, Remembers) and self.length.looks_back

    def allocate(self, layer: Layer, state: dict[str, Any]) -> None:
        """Add to a new state what the layer's owner keeps of it beside curvature."""
        loose = isinstance(layer, UncurvedParameter) and not takes_loose(self.rule)
        (self.fallback if loose else self.rule).allocate(layer, state)
        if isinstance(self.length, Keeps) and (self.looks_back or not loose):
            self.length.allocate(layer, state)
        if self.looks_back and loose and isinstance(self.fallback, Recalls):
            state["stretch"] = torch.zeros((), dtype=torch.float64)  # by this the last direction was multiplied
        elif self.looks_back and (loose or directions_kept(self.rule) is None):
            weight = layer.parameters[0]
            state["last"] = torch.zeros(layer.shape, dtype=real_type(weight), device=weight.device)

    def vectors(self) -> tuple[int, int]:
        """How many vectors of a layer's size an owner keeps: with curvature, and without."""
        own = not leaves_weights(self.rule)
        curved, loose = own + isinstance(self.length, Keeps), 2 * own  # the rule's, the length's; of the fallback
        if self.looks_back:  # the last direction, if it is nowhere else
            curved += directions_kept(self.rule) is None
            loose += not isinstance(self.fallback, Recalls)
        return curved, loose

    def forget(self) -> None:
        """Drop what was made of a state that is no longer the optimizer's."""
        forget = getattr(self.natural, "forget", None)
        if forget is not None:
            forget()

    def constants(self, groups: Iterable[Mapping[str, Any]]) -> tuple[Hashable, ...]:
        """The numbers of the groups by which a step decides on the host."""
        names = ["momentum", "momentum_last", "weight_decay", "weight_decay_last", "damping"]
        if self.reduction == "sum":
            names.append("batch")
        kept = self.rule.constant if isinstance(self.rule, Momentum) else lambda group: None
        return tuple((*(group.get(name) for name in names), kept(dict(group))) for group in groups)

    def uncuttable(self) -> dict[str, bool]:
        """Choices that need whole layers where ranks have parts of them, and whether they were made."""
        own = self.length in (plain, trust) or type(self.length) in (KLClip, MeasuredChange)
        known = type(self.rule) in (Momentum, Conjugate) and type(self.fallback) in (Adam, PlainGradient)
        return {
            "Preconditioner()": leaves_weights(self.rule),
            "rescale=": self.rescale is not None,
            'gather="directions" or CurvatureStep()': self.gather == "directions",
            "prescale=": isinstance(self.rule, Conjugate) and self.rule.prescale is not None,
            "A rule, length or fallback of your own": not (own and known),
        }

    def unrecordable(self) -> dict[str, bool]:
        """Choices with which a step is not the same launches from step to step, and whether they were made."""
        kinds = (type(self.length), type(self.rule), type(self.fallback))
        own = self.length in (plain, trust) or kinds[0] in (KLClip, MeasuredChange)
        return {
            "rescale": self.rescale is not None,
            'gather="directions"': self.gather == "directions",
            "a rule, length or fallback of your own": not own or kinds[1:] != (Momentum, Adam),
        }
