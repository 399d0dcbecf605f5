"""How much a step may change the network's outputs: as curvature predicts it, or as the next gradient has shown it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from natgrad.layers import Layer, UncurvedParameter
from natgrad.layers.layer import real_type
from natgrad.optim.segments import Segment
from natgrad.parallel import World

TINY = 1e-300
EVERYBODY = 1 - 1e-9  # a sum of 1 / ranks over all ranks is at least this


class LastStep(NamedTuple):
    """What is known of the length of the step that was made last."""

    change: float = 0.0
    """lr^2 d^T F d as the curvature predicts it, of the step as it was made: twice the KL divergence in nats."""
    bound: float = 0.0
    """The largest predicted change that was permitted."""
    factor: float = 1.0
    """By this the step was shortened, 1 where it was not."""
    ratio: float = 1.0
    """Curvature along earlier steps as gradients have shown it, over what was predicted; 1 where nobody measures it."""
    loose: float = 1.0
    """By this the step of parameters without curvature was shortened."""
    descent: float = 0.0
    """lr d . g of the step as it was made: to first order, by so much it lowers the loss."""
    held: float = 1.0
    """The part of `factor` and `loose` that is due to the loss that was told, 1 where it was not in the way."""


@dataclass(frozen=True)
class KLClip:
    """All layers together shortened so that lr^2 d^T F d, twice the change of the output (KL), is at most `limit`.

    The KL clip of Ba, Grosse and Martens (2017, section 5.3) takes d . g for d^T F d, which holds for one natural
    gradient. A direction that repeats others, d = sum m^k F^-1 g_k, has F d = h = sum m^k g_k as long as F stands
    still: gradients are summed as their directions are, and d . h is taken (ours). d . g is by 1/(1 - m) too small
    while gradients agree, and nothing once d has overshot, just when a step should be held back. One number travels.

    Args:
        limit: twice the change of the output (KL), as it is predicted, above which a step is shortened.

    """

    limit: float = 0.01
    numbers: ClassVar[Mapping[str, float]] = {"change": 0.0, "bound": 0.0, "factor": 1.0}
    sums: ClassVar[int] = 1
    looks_back: ClassVar[bool] = False

    def __post_init__(self):
        if not self.limit > 0:
            raise ValueError(f"KLClip(limit={self.limit}): give a change above 0")

    def allocate(self, layer: Layer, state: dict) -> None:
        """Make room for the sum of gradients of one layer."""
        allocate_sum(layer, state)

    def look_back(self, segments: Sequence[Segment]) -> None:
        """What came of the last step does not matter here."""

    def lengths(self, segments: Sequence[Segment], world: World, numbers: dict[str, Tensor]) -> list[Tensor]:
        """The same factor for every layer; `numbers` are told what was done."""
        change = torch.zeros_like(numbers["change"])
        for segment in segments:
            change += segment.sums((segment.direction, summed(segment), segment.lr**2)).sum().to(change.device)
        world.sum_over_owners([change], "scalars")
        factor = shortened(change, self.limit)
        bound = torch.full_like(change, self.limit)
        numbers.update(change=torch.minimum(change.abs(), bound), bound=bound, factor=factor)
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

    A loss that is told, and above 0, bounds steps as well. Gradients of samples that are learnt by heart vanish, and
    their squares, which are all that the empirical Fisher has of a curvature, vanish faster: F^-1 g asks every sample
    for the same decrease, whatever is left of its loss, and no quadratic model shows how soon curvature comes back
    along such a step. So what a step asks of samples to first order is bounded: the mean, lr d . g, by a share of the
    loss, and the root mean square, which is the root of the predicted change, by the loss.

    Three dot products a layer more than for a plain length; no pass and no message more than for KLClip. A loss that is
    told is one of 16 bytes, where every rank keeps all layers.

    Args:
        limit: twice the change of the output (KL) above which a step is shortened.
        first: ratio of the shown to the predicted curvature before anything is measured.
        least: predicted change that a step may always have.
        most: predicted change that no step may exceed.
        memory: share of the old means that a step keeps.
        share_of_loss: a step lowers the loss by at most this share of it, to first order, where the loss is told. None:
            the loss bounds nothing, because it can fall below 0 (log densities).

    """

    limit: float = 0.25
    first: float = 50.0
    least: float = 0.005
    most: float = 0.1
    memory: float = 0.8
    share_of_loss: float | None = 0.5
    numbers: ClassVar[Mapping[str, float]] = {
        **KLClip.numbers,
        "ratio": 1.0,
        "loose": 1.0,
        "shown": 0.0,
        "foreseen": 0.0,
        "heard": 0.0,
        "shown_loose": 0.0,
        "walked_loose": 0.0,
        "descent": 0.0,
        "held": 1.0,
    }
    sums: ClassVar[int] = 8
    looks_back: ClassVar[bool] = True
    hears_loss: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("limit", "first", "least", "most"):
            if not getattr(self, name) > 0:
                raise ValueError(f"MeasuredChange({name}={getattr(self, name)}): give a number above 0")
        if self.least > self.most:
            raise ValueError(f"MeasuredChange(least={self.least}, most={self.most}): give a least up to most")
        if not 0 <= self.memory < 1:
            raise ValueError(f"MeasuredChange(memory={self.memory}): give a share from 0 to below 1")
        if self.share_of_loss is not None and not self.share_of_loss > 0:
            raise ValueError(f"MeasuredChange(share_of_loss={self.share_of_loss}): give a share above 0, or None")

    def allocate(self, layer: Layer, state: dict) -> None:
        """Make room for the sum of gradients of one layer, and for what its last step was."""
        if not isinstance(layer, UncurvedParameter):
            allocate_sum(layer, state)
        state["went"] = torch.zeros(3, dtype=torch.float64)  # length along the direction, prediction, slope

    def look_back(self, segments: Sequence[Segment]) -> None:
        """How every layer's last direction meets its new gradient, before a rule changes the direction."""
        for segment in segments:
            past, segment.past = segment.past, None
            segment.products = torch.zeros_like(segment.gradient) if past is None else past * segment.gradient

    def lengths(self, segments: Sequence[Segment], world: World, numbers: dict[str, Tensor]) -> list[Tensor]:
        """One factor for layers with curvature and one for parameters without, from what `numbers` remember."""
        told = numbers["ratio"].new_zeros(2, 4)
        ahead, descents = [self._look_ahead(segment) for segment in segments], list[Tensor]()
        for segment, (predictions, slopes, met) in zip(segments, ahead):
            length, foreseen, before = segment.state["went"].unbind(1)
            shown = torch.addcmul(before, met, length, value=1 / segment.terms).neg()
            descents.append(slopes * segment.lr if segment.terms == 1 else slopes * segment.lr / segment.terms)
            sums = torch.stack([shown, foreseen, predictions, descents[-1]]).sum(1).to(told.device)
            told[0 if foretold(segment) else 1] += sums  # shown and foreseen of the last step, the others of this one
        loss = numbers.pop("loss", None)
        world.sum_over_owners([told], "scalars", [] if loss is None else [loss])
        self._learn(numbers, told[:, :2])
        change, change_loose = told[:, 2].unbind()
        bound = (self.limit / numbers["ratio"]).clamp(self.least, self.most)
        factor = shortened(change, bound)
        bend = numbers["shown_loose"] / numbers["walked_loose"].clamp_min(TINY)
        loose = shortened(change_loose * bend.clamp_min(0), self.limit)
        descent = told[:, 3] @ torch.stack([factor, loose])
        change, held = torch.minimum(change.abs(), bound), torch.ones_like(descent)
        if loss is not None:
            held = self._held(descent, change, *loss.unbind())
            factor, loose, descent, change = factor * held, loose * held, descent * held, change * held.square()
        numbers.update(change=change, bound=bound, factor=factor, loose=loose, descent=descent, held=held)
        factors = [(factor if foretold(segment) else loose).to(segment.gradient.device) for segment in segments]
        for segment, (predictions, *_), descending, own in zip(segments, ahead, descents, factors):
            steps = (segment.lr * own).expand_as(predictions)
            went = [steps, predictions * own.square(), descending * -own]
            segment.state["went"] = torch.stack(went, 1)
            if "last" in segment.state:
                segment.state["last"].copy_(segment.direction)
        return factors

    def _held(self, descent: Tensor, change: Tensor, loss: Tensor, everybody: Tensor) -> Tensor:
        """The factor, at most 1, by which the loss shortens a step that asks for this descent and this change."""
        if self.share_of_loss is None:
            return torch.ones_like(descent)
        mean = self.share_of_loss * loss / descent.clamp_min(TINY)
        least = torch.minimum(mean, loss / change.clamp_min(TINY).sqrt())
        return torch.where((everybody > EVERYBODY) & (least > 0) & (least < 1), least, 1.0)

    def _look_ahead(self, segment: Segment) -> Tensor:
        """Each layer's predicted change (of loose ones lr^2), d . g and last d . g [3, layers]."""
        assert segment.products is not None
        along, met = (segment.direction, segment.gradient), segment.products
        segment.products = None
        if foretold(segment):
            return segment.sums((segment.direction, summed(segment), segment.lr**2), along, (met,))
        sums = segment.sums(along, (met,))
        return torch.cat([(segment.lr**2).expand_as(sums[:1]), sums])

    def _learn(self, numbers: dict[str, Tensor], told: Tensor) -> None:
        """Running sums of what was shown and foreseen [curved or loose, 2], and their ratio, at first `first`."""
        names = (("shown", "foreseen"), ("shown_loose", "walked_loose"))
        known = torch.stack([numbers[name] for own in names for name in own]).view(2, 2)
        says = (told[:, 1:] > 0) & torch.isfinite(told).all(1, keepdim=True)
        known = torch.where(says, torch.lerp(known, told, 1 - self.memory), known)
        numbers.update(zip([name for own in names for name in own], known.flatten().unbind()))
        numbers["heard"] = numbers["heard"] + says[0, 0]
        left = self.memory ** numbers["heard"] * self.limit
        ratio = (numbers["shown"] + left) / (numbers["foreseen"] + left / self.first)
        numbers["ratio"] = ratio.clamp_min(TINY)


def allocate_sum(layer: Layer, state: dict) -> None:
    """The sum of a layer's gradients that goes with its direction."""
    weight = layer.parameters[0]
    state["gradients"] = torch.zeros(layer.shape, dtype=real_type(weight), device=weight.device)


def foretold(segment: Segment) -> bool:
    """Whether the layers' curvature predicts what their step changes."""
    return "gradients" in segment.state


def summed(segment: Segment) -> Tensor:
    """The sum of gradients h [n], taken one step further: lr^2 d . h is what the curvature predicts of a step."""
    return segment.state["gradients"].mul_(segment.keep).add_(segment.gradient)


def shortened(change: Tensor, bound: Tensor | float) -> Tensor:
    """The factor, at most 1, that brings a change that is quadratic in it to the bound; 0 if that is no number."""
    return (bound / change.abs().clamp_min(TINY)).sqrt().clamp_max(1).nan_to_num(0.0)


kl_clip = KLClip()
"""All layers shortened so that curvature predicts a change of the outputs of at most 0.01."""
measured_change = MeasuredChange()
"""All layers shortened so that outputs change by at most 0.25, as later gradients show: the default length."""
