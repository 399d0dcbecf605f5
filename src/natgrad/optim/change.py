"""How much a step may change the network's outputs: as curvature predicts it, or as the next gradient has shown it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from natgrad.layers import Layer, Loose
from natgrad.layers.base import real_type
from natgrad.optim.segments import Segment
from natgrad.parallel import World

TINY = 1e-300


class LastStep(NamedTuple):
    """What is known of the length of the step that was made last."""

    change: float
    """lr^2 d^T F d as the curvature predicts it, of the step as it was made: twice the KL divergence in nats."""
    bound: float
    """The largest predicted change that was permitted."""
    factor: float
    """By this the step was shortened, 1 where it was not."""
    ratio: float
    """Curvature along earlier steps as gradients have shown it, over what was predicted; 1 where nobody measures it."""
    loose: float
    """By this the step of parameters without curvature was shortened."""


@dataclass(frozen=True)
class PredictedChange:
    """All layers together shortened so that lr^2 d^T F d, twice the change of the output (KL), is at most `limit`.

    The KL clip of Ba, Grosse and Martens (2017, section 5.3) takes d . g for d^T F d, which holds for one natural
    gradient. A direction that repeats others, d = sum m^k F^-1 g_k, has F d = h = sum m^k g_k as long as F stands
    still: gradients are summed as their directions are, and d . h is taken (ours). d . g is by 1/(1 - m) too small
    while gradients agree, and nothing once d has overshot, just when a step should be held back. One number travels.
    """

    limit: float = 0.01
    numbers: ClassVar[Mapping[str, float]] = {"change": 0.0, "bound": 0.0, "factor": 1.0}
    sums: ClassVar[int] = 1
    looks_back: ClassVar[bool] = False

    def __post_init__(self):
        if not self.limit > 0:
            raise ValueError(f"PredictedChange(limit={self.limit}): give a change above 0")

    def allocate(self, layer: Layer, state: dict) -> None:
        """Make room for the sum of gradients of one layer."""
        allocate_sum(layer, state)

    def look_back(self, segments: Sequence[Segment]) -> None:
        """What came of the last step does not matter here."""

    def lengths(self, segments: Sequence[Segment], world: World, numbers: dict[str, float]) -> list[float]:
        """The same factor for every layer; `numbers` are told what was done."""
        change = torch.zeros(1, dtype=torch.float64)
        if segments:  # one wait for the device
            change += torch.stack([predicted(segment).sum(dtype=torch.float64) for segment in segments]).sum().cpu()
        world.over_owners([change], "scalars")
        factor = shortened(change.item(), self.limit)
        numbers.update(change=abs(change.item()) * factor**2, bound=self.limit, factor=factor)
        return [factor] * len(segments)


@dataclass(frozen=True)
class MeasuredChange:
    """All layers together shortened so that outputs change by at most `limit`, as the next gradients show it (ours).

    Blocks know nothing of each other, so for directions on which layers agree they predict too little: the curvature
    along s was 14 to 44 times as much as the sum over layers on a small ResNet, 5 to 34 times on a transformer, and
    the ratio moves within a run (docs/math.md, benchmarks/change.py). After a step s from gradient g to g',
    s . (g' - g) is the curvature along s as it was, other layers' part included. Means of it and of the prediction, the
    last steps weighing most, give their ratio, and the next step may predict limit / ratio. `first` is the ratio before
    anything has been measured, and weighs as much as `memory` leaves of it. A step may predict at least `least`,
    because the noise of small batches, which is in s and in g, is taken for curvature; and `most` at most.

    Parameters without curvature have a length and no prediction: their step is a share of their weight's norm, as the
    learning rate says. They are shortened so that s . (g' - g) of theirs stays below `limit` too.

    Three dot products a layer more than for a plain length; no pass and no message more than for PredictedChange.
    """

    limit: float = 0.25
    first: float = 50.0
    least: float = 0.005
    most: float = 0.1
    memory: float = 0.8
    numbers: ClassVar[Mapping[str, float]] = {
        **PredictedChange.numbers,
        "ratio": 1.0,
        "loose": 1.0,
        "shown": 0.0,
        "foreseen": 0.0,
        "heard": 0.0,
        "shown_loose": 0.0,
        "walked_loose": 0.0,
    }
    sums: ClassVar[int] = 6
    looks_back: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("limit", "first", "least", "most"):
            if not getattr(self, name) > 0:
                raise ValueError(f"MeasuredChange({name}={getattr(self, name)}): give a number above 0")
        if self.least > self.most:
            raise ValueError(f"MeasuredChange(least={self.least}, most={self.most}): give a least up to most")
        if not 0 <= self.memory < 1:
            raise ValueError(f"MeasuredChange(memory={self.memory}): give a share from 0 to below 1")

    def allocate(self, layer: Layer, state: dict) -> None:
        """Make room for the sum of gradients of one layer, and for what its last step was."""
        if not isinstance(layer, Loose):
            allocate_sum(layer, state)
        state["went"] = torch.zeros(3, dtype=torch.float64)  # length along the direction, prediction, slope

    def look_back(self, segments: Sequence[Segment]) -> None:
        """How every layer's last direction meets its new gradient, before a rule changes the direction."""
        for segment in segments:
            segment.products = segment.gradient.new_zeros(3, len(segment.gradient))
            if segment.past is not None:
                torch.mul(segment.past, segment.gradient, out=segment.products[2])

    def lengths(self, segments: Sequence[Segment], world: World, numbers: dict[str, float]) -> list[float]:
        """One factor for layers with curvature and one for parameters without, from what `numbers` remember."""
        ahead = self._look_ahead(segments)
        sums = [[0.0] * 3, [0.0] * 3]  # curved, loose: shown, foreseen, and the prediction of this step
        for segment, layers in zip(segments, ahead):
            own = sums[0 if foretold(segment) else 1]
            for cell, (prediction, _, met) in zip(segment.cells, layers):
                length, foreseen, before = cell.numbers["went"]
                if length:
                    own[0] += -length * met / segment.terms - before
                    own[1] += foreseen
                own[2] += prediction
        told = torch.tensor(sums, dtype=torch.float64)
        world.over_owners([told], "scalars")
        (shown, foreseen, change), (shown_loose, walked, change_loose) = told.tolist()
        self._learn(numbers, (shown, foreseen), (shown_loose, walked))
        bound = min(self.most, max(self.least, self.limit / numbers["ratio"]))
        factor = shortened(change, bound)
        bend = numbers["shown_loose"] / max(numbers["walked_loose"], TINY)
        loose = shortened(change_loose * max(bend, 0.0), self.limit)
        numbers.update(change=abs(change) * factor**2, bound=bound, factor=factor, loose=loose)
        for segment, layers in zip(segments, ahead):
            own_factor = factor if foretold(segment) else loose
            step = segment.lr * own_factor
            for cell, (prediction, slope, _) in zip(segment.cells, layers):
                cell.numbers["went"] = [step, prediction * own_factor**2, -step * slope / segment.terms]
            if "last" in segment.state:
                segment.state["last"].copy_(segment.direction)
        return [factor if foretold(segment) else loose for segment in segments]

    def _look_ahead(self, segments: Sequence[Segment]) -> list[list[list[float]]]:
        """Each layer's predicted change (of loose ones lr^2), d . g and last d . g, with one wait for the device."""
        if not segments:
            return []
        told = []
        for segment in segments:
            assert segment.products is not None
            if foretold(segment):
                predicted(segment, out=segment.products[0])
            torch.mul(segment.direction, segment.gradient, out=segment.products[1])
            sums, segment.products = segment.sums(segment.products), None
            if not foretold(segment):
                sums[0] = segment.lr**2
            told.append(sums.to(segments[0].gradient.device))
        rows = torch.cat(told, 1).T.tolist()
        counts = [len(segment.cells) for segment in segments]
        return [rows[sum(counts[:k]) : sum(counts[: k + 1])] for k in range(len(counts))]

    def _learn(self, numbers: dict[str, float], curved: tuple[float, float], loose: tuple[float, float]) -> None:
        """Running sums of what was shown and foreseen, and their ratio, at first that of `first`."""
        fresh = 1 - self.memory
        for (shown, foreseen), names in ((curved, ("shown", "foreseen")), (loose, ("shown_loose", "walked_loose"))):
            if foreseen > 0:
                numbers["heard"] += names[0] == "shown"
                for name, value in zip(names, (shown, foreseen)):
                    numbers[name] = self.memory * numbers[name] + fresh * value
        left = self.memory ** numbers["heard"] * self.limit
        ratio = (numbers["shown"] + left) / (numbers["foreseen"] + left / self.first)
        numbers["ratio"] = max(ratio, TINY)


def allocate_sum(layer: Layer, state: dict) -> None:
    """The sum of a layer's gradients that goes with its direction."""
    weight = layer.parameters[0]
    state["gradients"] = torch.zeros(layer.shape, dtype=real_type(weight), device=weight.device)


def foretold(segment: Segment) -> bool:
    """Whether the layers' curvature predicts what their step changes."""
    return "gradients" in segment.state


def predicted(segment: Segment, out: Tensor | None = None) -> Tensor:
    """lr^2 d h, entry by entry [n], with h taken one step further."""
    gradients = segment.state["gradients"].mul_(segment.keep).add_(segment.gradient)
    return torch.mul(segment.direction, gradients, out=out).mul_(segment.lr**2)


def shortened(change: float, bound: float) -> float:
    """The factor, at most 1, that brings a change that is quadratic in it to the bound."""
    return min(1.0, math.sqrt(bound / max(abs(change), TINY)))


predicted_change = PredictedChange()
measured_change = MeasuredChange()
