"""Nonlinear conjugate gradients as a rule of direction (Adya, Palakkode and Tuzel 2018, arXiv 1812.02886).

    d = -q(g) + beta d',   beta from inner products over ALL parameters (betas.py),   w <- w + lr b d

What a rank owns is put behind one another as one flat vector, so that a step is a dozen passes and not a dozen for each
layer. D = -d is what is kept, as w <- w - lr D. At most two messages of at most five numbers travel:

    1   y.s, s.(h s)  (what the metric learns by),  g.q'(g'),  the loss and whether all ranks told one
    2   g.q(g), D'.g, q(g).g', y.q(y)               (they need the new metric)

and every rank comes to the same beta and multiplier from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from natgrad.layers.base import Layer, promote, real, real_type
from natgrad.optim.betas import Products, needs_of
from natgrad.optim.lengths import Natural
from natgrad.optim.metrics import Metric
from natgrad.optim.part import Part, joined, parts_of, total
from natgrad.optim.search import CurvatureStep, Memory, Scheduled
from natgrad.optim.segments import Segment
from natgrad.parallel import World
from natgrad.readings import on_host

TURNED = 1e-3  # of g.q(g): a direction that descends less starts afresh
STANDS = 1e-8  # a learning rate below it takes nothing back


class Conjugate:
    """The rule. `metric` None: the natural gradients of the layers' curvature. `memory` finds what is remembered,
    `told` this rank's loss.
    """

    takes_loose = True  # all parameters are in the inner products

    def __init__(
        self,
        beta: Callable[[Products], float],
        beta_max: float,
        metric: Metric | None,
        search: Scheduled | CurvatureStep,
        faithful: bool,
        prescale: float | None,
        memory: Callable[[], Memory],
        told: Callable[[], float | None],
    ):
        self.beta, self.beta_max, self.metric, self.search = beta, beta_max, metric, search
        self.faithful, self.prescale, self.memory, self.told = faithful, prescale, memory, told
        self.needs = needs_of(beta)
        self.next: Memory | None = None  # what is to be remembered of the step that was just made
        self.used = 0.0  # the last beta

    @property
    def keys(self) -> dict[str, float]:
        """The vectors that are kept of every layer, and their entries at the start."""
        keys, metric = {"nlcg_direction": 0.0}, self.metric
        if self.needs & {"qy", "yqy"} or (metric is not None and (metric.secant or self.needs)):
            keys["nlcg_gradient"] = 0.0
        if metric is None and "gz" in self.needs:
            keys["nlcg_natural"] = 0.0
        if metric is not None and metric.key is not None:
            keys[metric.key] = metric.start
        return keys

    def allocate(self, layer: Layer, state: dict[str, Any]) -> None:
        weight = layer.parameters[0]
        for key, start in self.keys.items():
            state[key] = torch.full(layer.shape, start, dtype=real_type(weight), device=weight.device)

    def __call__(self, segments: Sequence[Segment], natural: Natural, world: World) -> None:
        memory, gradients = self.memory(), [self.shaped(segment) for segment in segments]
        parts = parts_of(segments, gradients, self.keys)
        gz, loss = self._learn(parts, memory, world)
        self._precondition(parts, segments, gradients, natural, memory)
        delta, fall, over, yqy = self._products(parts, natural, world, memory)
        dg = -fall
        products = Products(delta, self._guard(memory.delta), gz, delta - over, dg - memory.slope, dg, yqy)
        sound = self.faithful or loss is None or math.isfinite(loss)
        beta = self._clamped(products) if memory.steps and sound else 0.0
        if not self.faithful and delta + beta * fall < TURNED * delta:
            beta = 0.0
        heard = replace(memory, undone=0.0)
        if loss is not None and math.isfinite(loss):
            heard = self.search.hear(heard, loss) if isinstance(self.search, Scheduled) else heard
        self._fill(parts, beta, memory, heard)
        self.used = beta
        self.next = replace(
            heard, steps=memory.steps + 1, delta=delta, slope=-(delta + beta * fall), length=heard.multiplier
        )

    def shaped(self, segment: Segment) -> Tensor:
        """The gradient of the whole loss, L2 penalty included, pre-scaled variable by variable if asked for."""
        gradient = segment.add_weights(segment.gradient)
        if self.prescale is None:
            return gradient
        gradient = gradient.clone()
        for view, parameter in zip(segment.views(gradient), segment.parameters):
            view.copy_(prescaled(view, real(promote(parameter.detach())), self.prescale))
        return gradient

    def _guard(self, delta: float) -> float:
        return delta + 1e-8 if self.faithful else max(delta, 1e-30)

    def _clamped(self, products: Products) -> float:
        beta = self.beta(products)
        return min(max(beta, 0.0), self.beta_max) if math.isfinite(beta) else 0.0

    def _learn(self, parts: Sequence[Part], memory: Memory, world: World) -> tuple[float, float | None]:
        """The first round: teach the metric. Returns g.q'(g') and the loss, None if not every rank told one."""
        metric, back = self.metric, memory.steps > 0
        secants = [self._secant(part, memory) for part in parts]
        rows, asks = [], "gz" in self.needs
        for part, secant in zip(parts, secants):
            row = [] if metric is None or secant is None else metric.products(self._kept(part), *secant)
            if asks and back:
                row.append(torch.dot(part.g, self._last_natural(part, memory)))
            rows.append(row)
        count = (metric.sums if metric is not None and back and metric.secant else 0) + (asks and back)
        values = total(world, count, rows if count else [], self._told(parts, world))
        loss = None
        if self.search.feedback is not None:
            *values, loss, told = values
            loss = loss if told > 1 - 1e-9 else None
        gz = values.pop() if asks and back else math.nan
        if metric is not None and (self.faithful or loss is None or math.isfinite(loss)):
            for part, secant in zip(parts, secants):
                settled = self.faithful or not memory.undone  # after taking back, the last direction is not the secant
                metric.learn(self._kept(part), part.g, secant if settled else None, values or [math.nan, math.nan])
        return gz, loss

    def _told(self, parts: Sequence[Part], world: World) -> list[float]:
        """The rank's loss with its layers' share of the L2 penalty, and whether it was told."""
        if self.search.feedback is None:
            return []
        loss = self.told()
        penalty = half_squares([segment for part in parts for segment in part.segments])
        return [(loss or 0.0) + penalty * (world.size if world.owners else 1), float(loss is not None)]

    def _secant(self, part: Part, memory: Memory) -> tuple[Tensor, Tensor] | None:
        """(y, s): how the gradient changed along the last step. The release takes today's learning rate for it."""
        if memory.steps == 0 or self.metric is None or not self.metric.secant:
            return None
        rates, times = ("lr", memory.multiplier) if self.faithful else ("lr_last", memory.length)
        return part.g - part.kept["nlcg_gradient"], part.scaled(part.kept["nlcg_direction"], rates).mul_(-times)

    def _kept(self, part: Part) -> Tensor:
        """The metric's own vector; the gradient where it keeps none."""
        key = None if self.metric is None else self.metric.key
        return part.g if key is None else part.kept[key]

    def _last_natural(self, part: Part, memory: Memory) -> Tensor:
        if self.metric is None:
            return part.kept["nlcg_natural"]
        return self.metric.inverse(self._kept(part), part.kept["nlcg_gradient"], int(memory.steps))

    def _precondition(
        self,
        parts: Sequence[Part],
        segments: Sequence[Segment],
        gradients: Sequence[Tensor],
        natural: Natural,
        memory: Memory,
    ) -> None:
        """Fill in every part's z = q(g)."""
        if self.metric is None:
            directions = natural(segments, gradients)
            for part in parts:
                part.z = joined([directions[k] for k in part.places])
        else:
            for part in parts:
                part.z = self.metric.inverse(self._kept(part), part.g, int(memory.steps) + 1)

    def _products(self, parts: Sequence[Part], natural: Natural, world: World, memory: Memory) -> list[float]:
        """The second round: g.q(g), D'.g, q(g).g' and y.q(y), the last two where they are asked for."""
        over, curved = bool(self.needs & {"qy", "yqy"}), "yqy" in self.needs
        rows = [[torch.dot(p.z, p.g), torch.dot(p.kept["nlcg_direction"], p.g)] for p in parts]
        if over:
            for row, part in zip(rows, parts):
                row.append(torch.dot(part.z, part.kept["nlcg_gradient"]))
        if curved:
            for row, (y, qy) in zip(rows, self._changes(parts, natural, memory)):
                row.append(torch.dot(y, qy))
        values = total(world, 2 + over + curved, rows)
        return values + [math.nan] * (4 - len(values))

    def _changes(self, parts: Sequence[Part], natural: Natural, memory: Memory) -> list[tuple[Tensor, Tensor]]:
        """(y, q(y)) of every part."""
        ys = [part.g - part.kept["nlcg_gradient"] for part in parts]
        if self.metric is not None:
            count = int(memory.steps) + 1
            return [(y, self.metric.inverse(self._kept(part), y, count)) for part, y in zip(parts, ys)]
        segments = [segment for part in parts for segment in part.segments]
        found = iter(natural(segments, [piece for part, y in zip(parts, ys) for piece in part.pieces(y)]))
        return [(y, joined([next(found) for _ in part.segments])) for part, y in zip(parts, ys)]

    def _fill(self, parts: Sequence[Part], beta: float, memory: Memory, heard: Memory) -> None:
        """Directions for the weights, new vectors for the states; the direction that is kept takes nothing back."""
        for part in parts:
            last = part.kept["nlcg_direction"]
            direction = part.z.add(last, alpha=beta) if beta else part.z
            used, undo = direction, heard.undone
            if undo and max(segment.lr for segment in part.segments) * heard.multiplier > STANDS:
                used = (direction * ((1 - undo) * heard.multiplier)).sub_(last, alpha=undo * memory.multiplier)
            elif heard.multiplier != 1:
                used = direction * heard.multiplier
            for segment, piece in zip(part.segments, part.pieces(used)):
                segment.direction = piece
            for key in self.keys:
                fresh = {"nlcg_direction": direction, "nlcg_gradient": part.g, "nlcg_natural": part.z}
                part.keep(key, fresh.get(key, part.kept[key]))


def prescaled(gradient: Tensor, weight: Tensor, eta: float) -> Tensor:
    """G eta |w| / (|g| + 1e-8 + 0.1 eta |w|), one variable's gradient (the release's option, 2.6 of specs)."""
    size = eta * torch.linalg.vector_norm(weight)
    return gradient * (size / (torch.linalg.vector_norm(gradient) + 1e-8 + 0.1 * size)).to(gradient)


def half_squares(segments: Sequence[Segment]) -> float:
    """The L2 penalty of these layers: the sum over their parameters of weight_decay |w|^2 / 2."""
    weighed = [
        (decay, promote(segment.parameters[k].detach()))
        for segment in segments
        for place, ks in segment.outline.by_group.items()
        if (decay := segment.outline.groups()[place]["weight_decay"])
        for k in ks
    ]
    norms = torch.cat(on_host(torch._foreach_norm([p for _, p in weighed]))).tolist() if weighed else []
    return sum(decay / 2 * norm**2 for (decay, _), norm in zip(weighed, norms))
