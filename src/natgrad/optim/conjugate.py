"""Nonlinear conjugate gradients as a rule of direction (Adya, Palakkode and Tuzel 2018, arXiv 1812.02886).

    d = -q(g) + beta d',   beta from inner products over ALL parameters (betas.py),   w <- w + lr b d

What a rank owns is put behind one another as one flat vector, so that a step is a dozen passes and not a dozen for each
layer. D = -d is what is kept, as w <- w - lr D. At most two messages of at most four numbers travel:

    1   y.s, s.(h s)  (what the metric learns by),  g.q'(g')
    2   g.q(g), D'.g, q(g).g', y.q(y)               (they need the new metric)

and every rank comes to the same beta from them. They stay on the device, and the host hears what is to be remembered
with the finite check of the next step. The loss has been heard with that of this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from natgrad.layers.layer import Layer, promote, real, real_type
from natgrad.optim.betas import Products, needs_of
from natgrad.optim.diagonal_metrics import Metric
from natgrad.optim.flat_shard import FlatShard, joined, parts_of, total
from natgrad.optim.line_search import CurvatureStep, Scheduled, SearchMemory
from natgrad.optim.segments import Segment
from natgrad.optim.step_size import Natural
from natgrad.parallel import World

TURNED = 1e-3  # of g.q(g): a direction that descends less starts afresh
STANDS = 1e-8  # a learning rate below it takes nothing back


class Conjugate:
    """The rule.

    metric: None for the natural gradients of the layers' curvature. memory: finds what is remembered. told: the step's
    loss, the mean over ranks with the L2 penalty; None where not every rank has told one. remember: takes what is to be
    remembered of the step, once the device has said it. ask: see readings.py.
    """

    takes_loose = True  # all parameters are in the inner products

    def __init__(
        self,
        beta: Callable[[Products], Tensor | float],
        beta_max: float,
        metric: Metric | None,
        search: Scheduled | CurvatureStep,
        faithful: bool,
        prescale: float | None,
        memory: Callable[[], SearchMemory],
        told: Callable[[], float | None],
        remember: Callable[[SearchMemory], None],
        ask: Callable[[Tensor, Callable[[Tensor], None]], None],
        device: Callable[[], torch.device],
    ):
        self.beta, self.beta_max, self.metric, self.search = beta, beta_max, metric, search
        self.faithful, self.prescale = faithful, prescale
        self.memory, self.told, self.remember, self.ask, self.device = memory, told, remember, ask, device
        self.needs = needs_of(beta)
        self.used = 0.0  # the last beta that was heard

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
        parts, loss = parts_of(segments, gradients, self.keys), self.told()
        sound = self.faithful or loss is None or math.isfinite(loss)
        gz = self._learn(parts, memory, world, sound)
        self._precondition(parts, segments, gradients, natural, memory)
        delta, fall, over, yqy = self._products(parts, natural, world, memory)
        dg, beta = -fall, None
        if memory.steps and sound:
            old = torch.full_like(delta, self._guard(memory.delta))
            beta = self._clamped(Products(delta, old, gz, delta - over, dg - memory.slope, dg, yqy))
            if not self.faithful:
                beta = torch.where(delta + beta * fall < TURNED * delta, 0.0, beta)
        heard = replace(memory, undone=0.0)
        if loss is not None and math.isfinite(loss) and isinstance(self.search, Scheduled):
            heard = self.search.hear(heard, loss)
        self._fill(parts, beta, memory, heard)
        used = torch.zeros_like(delta) if beta is None else beta
        after = replace(heard, steps=memory.steps + 1, length=heard.multiplier)
        self.ask(torch.stack([delta, -(delta + used * fall), used]), partial(self._hear, after))

    def _hear(self, after: SearchMemory, numbers: Tensor) -> None:
        """The device has said what was found: `after`, completed, is what the next step remembers."""
        delta, slope, self.used = numbers.tolist()
        self.remember(replace(after, delta=delta, slope=slope))

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

    def _clamped(self, products: Products) -> Tensor:
        beta = torch.as_tensor(self.beta(products), dtype=torch.float64, device=products.gqg.device)
        return torch.where(torch.isfinite(beta), beta.clamp(0, self.beta_max), 0.0)

    def _learn(self, parts: Sequence[FlatShard], memory: SearchMemory, world: World, sound: bool) -> Tensor:
        """The first round: teach the metric. Returns g.q'(g'). `sound`: the loss is a number."""
        metric, back = self.metric, memory.steps > 0
        secants = [self._secant(part, memory) for part in parts]
        rows, asks = [], "gz" in self.needs
        for part, secant in zip(parts, secants):
            row = [] if metric is None or secant is None else metric.products(self._kept(part), *secant)
            if asks and back:
                row.append(torch.dot(part.g, self._last_natural(part, memory)))
            rows.append(row)
        count = (metric.sums if metric is not None and back and metric.secant else 0) + (asks and back)
        values = total(world, count, rows if count else [], self.device())
        gz = values.pop() if asks and back else torch.full((), math.nan, dtype=torch.float64, device=self.device())
        if metric is not None and sound:
            for part, secant in zip(parts, secants):
                settled = self.faithful or not memory.undone  # after taking back, the last direction is not the secant
                metric.learn(self._kept(part), part.g, secant if settled else None, values)
        return gz

    def _secant(self, part: FlatShard, memory: SearchMemory) -> tuple[Tensor, Tensor] | None:
        """(y, s): how the gradient changed along the last step. The release takes today's learning rate for it."""
        if memory.steps == 0 or self.metric is None or not self.metric.secant:
            return None
        rates, times = ("lr", memory.multiplier) if self.faithful else ("lr_last", memory.length)
        return part.g - part.kept["nlcg_gradient"], part.scaled(part.kept["nlcg_direction"], rates).mul_(-times)

    def _kept(self, part: FlatShard) -> Tensor:
        """The metric's own vector; the gradient where it keeps none."""
        key = None if self.metric is None else self.metric.key
        return part.g if key is None else part.kept[key]

    def _last_natural(self, part: FlatShard, memory: SearchMemory) -> Tensor:
        if self.metric is None:
            return part.kept["nlcg_natural"]
        return self.metric.inverse(self._kept(part), part.kept["nlcg_gradient"], int(memory.steps))

    def _precondition(
        self,
        parts: Sequence[FlatShard],
        segments: Sequence[Segment],
        gradients: Sequence[Tensor],
        natural: Natural,
        memory: SearchMemory,
    ) -> None:
        """Fill in every part's z = q(g)."""
        if self.metric is None:
            directions = natural(segments, gradients)
            for part in parts:
                part.z = joined([directions[k] for k in part.places])
        else:
            for part in parts:
                part.z = self.metric.inverse(self._kept(part), part.g, int(memory.steps) + 1)

    def _products(
        self, parts: Sequence[FlatShard], natural: Natural, world: World, memory: SearchMemory
    ) -> list[Tensor]:
        """The second round: g.q(g), D'.g, q(g).g' and y.q(y), the last two where they are asked for."""
        over, curved = bool(self.needs & {"qy", "yqy"}), "yqy" in self.needs
        rows = [[torch.dot(p.z, p.g), torch.dot(p.kept["nlcg_direction"], p.g)] for p in parts]
        if over:
            for row, part in zip(rows, parts):
                row.append(torch.dot(part.z, part.kept["nlcg_gradient"]))
        if curved:
            for row, (y, qy) in zip(rows, self._changes(parts, natural, memory)):
                row.append(torch.dot(y, qy))
        values = total(world, 2 + over + curved, rows, self.device())
        return values + [torch.full_like(values[0], math.nan)] * (4 - len(values))

    def _changes(
        self, parts: Sequence[FlatShard], natural: Natural, memory: SearchMemory
    ) -> list[tuple[Tensor, Tensor]]:
        """(y, q(y)) of every part."""
        ys = [part.g - part.kept["nlcg_gradient"] for part in parts]
        if self.metric is not None:
            count = int(memory.steps) + 1
            return [(y, self.metric.inverse(self._kept(part), y, count)) for part, y in zip(parts, ys)]
        segments = [segment for part in parts for segment in part.segments]
        found = iter(natural(segments, [piece for part, y in zip(parts, ys) for piece in part.pieces(y)]))
        return [(y, joined([next(found) for _ in part.segments])) for part, y in zip(parts, ys)]

    def _fill(self, parts: Sequence[FlatShard], beta: Tensor | None, memory: SearchMemory, heard: SearchMemory) -> None:
        """Directions for the weights, new vectors for the states; the direction that is kept takes nothing back."""
        for part in parts:
            last = part.kept["nlcg_direction"]
            direction = part.z if beta is None else torch.addcmul(part.z, last, beta.to(last))
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
    """G eta |w| / (|g| + 1e-8 + 0.1 eta |w|), one variable's gradient (the release's option)."""
    size = eta * torch.linalg.vector_norm(weight)
    return gradient * (size / (torch.linalg.vector_norm(gradient) + 1e-8 + 0.1 * size)).to(gradient)
