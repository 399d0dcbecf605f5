"""Aim: from mean gradients to directions and lengths, at the layers' owner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from natgrad.curvature_engine import CurvatureEngine
from natgrad.optim.directions import decouples, directions_kept, leaves_weights
from natgrad.optim.fallback import Recalls
from natgrad.optim.method import Method
from natgrad.optim.segments import Outlines, Segment
from natgrad.optim.sharded import AtOwners, ShardSegment
from natgrad.optim.step_size import Remembers, StepSize, hears_loss, remembers, trust_ratios
from natgrad.readings import Inputs


class Aim:
    """Finds the step of the layers that this rank owns.

    hear: is told, at the next read, what the length has learned. loss: gives this rank's share of the mean loss over
    ranks and of the number of ranks that were told theirs [2]; None where none was. owners: of a model of which ranks
    hold parts, those who know whole layers; the segments are then of this rank's parts.
    """

    def __init__(
        self,
        method: Method,
        engine: CurvatureEngine,
        outlines: Outlines,
        inputs: Inputs,
        hear: Callable[[Tensor], None],
        loss: Callable[[], Tensor | None],
        owners: AtOwners | None = None,
    ):
        self.method, self.engine, self.outlines, self.inputs, self.hear = method, engine, outlines, inputs, hear
        self.loss = loss
        self.storage, self.owners = outlines.storage, owners
        self.world = engine.world if owners is None else owners.storage.world

    def segments(self, places: Iterable[int], vectors: Sequence[Tensor | None], bare: bool) -> list[Segment]:
        """The segments of the layers at these places that this rank owns, with their gradients."""
        storage, kept = self.storage, directions_kept(self.method.rule)
        segments = []
        rates: dict[torch.device, Sequence[Tensor]] = {}
        for outlines, layout, mine, vector in zip(self.outlines.of(places), storage.layouts, storage.mine, vectors):
            device = layout.kind[1]
            if outlines and device not in rates:
                told = self.inputs.get(lambda: [group["lr"] for group in self.outlines.groups()], device)
                rates[device] = told.unbind()
            for outline in outlines:
                assert vector is not None
                begin = outline.start - layout.start[mine[0]]
                gradient, fresh = vector[begin : begin + outline.numel], frozenset(self.engine.whole)
                kind = Segment if self.owners is None else ShardSegment
                segment = kind(outline, gradient, self.inputs, rates[device], fresh)
                segment.terms = self._terms(segment.group)
                segment.curved = outline.curved and not bare
                segment.past = segment.state.get("last", segment.state.get(kept) if kept else None)
                segments.append(segment)
        return segments

    def __call__(self, segments: Sequence[Segment], bare: bool) -> list[Tensor | float]:
        """Fill in all directions; return the factors by which they are to be multiplied.

        bare: none of the segments has a curvature, and nobody learns from them.
        """
        length, curved = self.method.length, [segment for segment in segments if segment.curved]
        judged = list(segments) if remembers(length) and length.looks_back else curved
        if remembers(length) and not bare:
            for segment in judged if length.looks_back else ():
                if segment.past is None and not segment.curved:
                    segment.past = self._recalled(segment)
            length.look_back(judged)
        if not bare:
            self.method.rule(curved, self._natural, self.world)
        for segment in segments:
            if not segment.curved:
                self._stretch(segment, bare)
        if bare:
            return [1.0] * len(segments)
        if not remembers(length):
            found = dict(zip(map(id, curved), cast(StepSize, length)(curved, self.world)))
            return [found.get(id(segment), 1.0) for segment in segments]
        numbers = self._learned(length)
        found = dict(zip(map(id, judged), length.lengths(judged, self.world, numbers)))
        self.storage.readings.ask(torch.stack([numbers[name] for name in length.numbers]), self.hear)
        return [found.get(id(segment), 1.0) for segment in segments]

    def _natural(self, segments: Sequence[Segment], gradients: Sequence[Tensor]) -> list[Tensor]:
        """The natural gradients of these gradients, by whoever knows the whole layers."""
        if self.owners is None:
            return self.method.natural(segments, gradients)
        return self.owners(self.method.natural, segments, gradients, frozenset(self.engine.whole))

    def _learned(self, length: Remembers) -> dict[str, Tensor]:
        """What a length remembers, on the device."""

        def now() -> list[float]:
            return [self.outlines.groups()[0].get(name, value) for name, value in length.numbers.items()]

        numbers = dict(zip(length.numbers, self.inputs.get(now, self.storage.device).unbind()))
        if hears_loss(length) and self.loss() is not None:
            numbers["loss"] = self.inputs.get(self._loss_a_sample, self.storage.device)
        return numbers

    def _loss_a_sample(self) -> Tensor:
        """Give this rank's share of the mean loss, and of the ranks that were told theirs [2]."""
        loss, told = cast(Tensor, self.loss()).unbind()
        return torch.stack([loss / self._terms(self.outlines.groups()[0]), told])

    def _terms(self, group: Mapping[str, Any]) -> float:
        """By this a rank's loss and gradient are larger than a mean over its samples."""
        return max(group["batch"] / self.world.size, 1.0) if self.method.reduction == "sum" else 1.0

    def _stretch(self, segment: Segment, bare: bool) -> None:
        """The fallback's direction, or the gradient's, as long as the weight."""
        if leaves_weights(self.method.rule):
            segment.direction = segment.gradient  # the optimizer that makes the step knows how long its own are
            return
        direction = segment.gradient if bare else self.method.fallback.direction(segment)
        segment.direction = direction if decouples(self.method.rule) else segment.add_weights(direction)
        ratios = trust_ratios(segment)
        segment.direction = segment.direction * segment.spread(ratios)
        if "stretch" in segment.state and not bare:
            segment.state["stretch"] = ratios

    def _recalled(self, segment: Segment) -> Tensor | None:
        """The last direction of parameters without curvature [n], made again from what the fallback keeps.

        It was d = r (a + c w): r the trust ratio of `_stretch`, a the fallback's direction, c the weight decay. The
        step has made w - s d of the weights w, so d = r (a + c (w - s d)) / (1 - r c s). Where somebody else has
        changed the weights since, the decay is that of what they have become. Decoupled decay is no part of d.
        """
        if not isinstance(self.method.fallback, Recalls):
            return None
        ratios, direction = segment.state["stretch"], self.method.fallback.again(segment)
        decay = segment.group.get("weight_decay_last", segment.group["weight_decay"])
        if decay and not decouples(self.method.rule):
            direction = segment.add_weights(direction, decay)
            ratios = ratios / (1 - decay * ratios * segment.state["went"][:, 0])
        return direction * segment.spread(ratios.to(direction))
