"""NLCG: stochastic preconditioned nonlinear conjugate gradients (Adya, Palakkode and Tuzel 2018, arXiv 1812.02886)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from natgrad.curvature import Curvature, Identity
from natgrad.deprecated import renamed_arguments
from natgrad.layer_state import LayerState
from natgrad.layers import Layer, UncurvedParameter
from natgrad.layers.layer import promote
from natgrad.optim import validation
from natgrad.optim.arguments import OfNlcg
from natgrad.optim.betas import Products, fletcher_reeves
from natgrad.optim.blocks import Blocks
from natgrad.optim.choices import OF_CURVATURE, REFUSED, check_choices
from natgrad.optim.conjugate import Conjugate
from natgrad.optim.coverage import CoverageTable
from natgrad.optim.curvature_step import minimum
from natgrad.optim.diagonal_metrics import DiagonalBFGS, Metric
from natgrad.optim.fallback import plain_gradient
from natgrad.optim.line_search import CurvatureStep, Scheduled, SearchMemory
from natgrad.optim.second_order import SecondOrder
from natgrad.optim.step_size import plain
from natgrad.readings import to_device, together

if TYPE_CHECKING:
    from typing_extensions import Unpack


class NLCG(SecondOrder, shared=OfNlcg, defaults=OF_CURVATURE):
    """Conjugate directions d = -q(g) + beta d' over all parameters, as long as the schedule and the loss allow.

    Tell it the loss of each step, as `step(closure)`, `step(loss=...)` or `report(loss)`, so that it can draw back when
    the loss grows; without one it follows the schedule alone, and warns once. It is for batches of a sixteenth of the
    data or more.

    Args:
        model: as for SPNGD.
        lr: ceiling of the step; None: 0.1 (times batch / 256 in the release). With CurvatureStep() a factor up to 1,
            the same for all parameters; None: 1.
        weight_decay: strength of an L2 penalty that is part of the loss: in the gradient before all else, and in the
            loss that is told (tell it without).
        preconditioner: what gradients are divided by: DiagonalBFGS(), SecondMoment(), None for the identity, or the
            curvature of layers: spngd_blocks, LayerBlocks(...), SampleBlocks(...). With a curvature, what has none
            keeps its plain gradient.
        beta: how much of the last direction is kept: fletcher_reeves, polak_ribiere, hestenes_stiefel, dai_yuan, hs_dy,
            hager_zhang, or a function of Products.
        beta_max: the most that is kept: beta is held in [0, beta_max].
        step: how long steps are. Scheduled(feedback=...): the learning rate, held back by the loss; CurvatureStep():
            the minimum along the direction, which wants `step(forward=lambda: model(x))`.
        mode: "hardened", or "faithful": the authors' release to the letter, in one defined order.
        prescale: share of a weight's norm to which its gradient is brought first: eta of the release's LARS-like
            scaling, suggested 0.001; None: off.
        **shared: see natgrad.optim.arguments.OfNlcg.

    The strong choice is a curvature with the curvature step, which needs no learning rate: `NLCG(model,
    preconditioner=spngd_blocks, beta=polak_ribiere, step=CurvatureStep(), fisher="sampled")`.

    Raises:
        ValueError: names the value that cannot be and the way out.

    """

    elsewhere = REFUSED

    @renamed_arguments(samples="rows_per_dim", decay="ema_decay")
    def __init__(
        self,
        model: nn.Module,
        lr: float | None = None,
        *,
        weight_decay: float = 0.0,
        preconditioner: Metric | Blocks | None = DiagonalBFGS(),  # noqa: B008  (frozen)
        beta: Callable[[Products], Tensor | float] = fletcher_reeves,
        beta_max: float = 1.0,
        step: Scheduled | CurvatureStep = Scheduled(),  # noqa: B008
        mode: Literal["hardened", "faithful"] = "hardened",
        prescale: float | None = None,
        **shared: Unpack[OfNlcg],
    ):
        metric = Metric() if preconditioner is None else preconditioner
        blocks = None if isinstance(metric, Metric) else metric
        check_choices(metric, beta, beta_max, step, mode, prescale, shared)
        if mode == "faithful" and metric == DiagonalBFGS():
            metric = DiagonalBFGS(floor=0.0, eps=1e-8)
        lr = (1.0 if isinstance(step, CurvatureStep) else 0.1) if lr is None else lr
        rule = Conjugate(
            beta,
            beta_max,
            metric if isinstance(metric, Metric) else None,
            step,
            mode == "faithful",
            prescale,
            self._memory,
            lambda: self._heard,
            self._remember,
            lambda numbers, hear: self.readings.ask(numbers, hear),
            lambda: self.storage.device,
        )
        self._forward: Callable[[], Tensor] | None = None
        self._heard: float | None = None  # of all ranks, this step's
        self.search, self.conjugate, self.metric = step, rule, rule.metric
        self._model = model
        super().__init__(
            model,
            lr,
            momentum=0.0,
            weight_decay=weight_decay,
            curvature=bare if blocks is None else blocks,
            rule=rule,
            length=plain,
            gather="directions" if isinstance(step, CurvatureStep) else "weights",
            fallback=plain_gradient,
            **{**OF_CURVATURE, **shared},
        )
        self._model = validation.plain_model(model)
        self.method.probe = self._probe if isinstance(step, CurvatureStep) else None
        self._check_groups()

    def _check_groups(self) -> None:
        """What groups may say: no momentum, no damping where nothing is damped, one lr for one length."""
        for group in self.param_groups:
            if group["momentum"]:
                cycled = (
                    " (OneCycleLR and CyclicLR set it: pass them cycle_momentum=False)"
                    if "base_momentum" in group
                    else ""
                )
                raise ValueError(
                    f"momentum={group['momentum']} in a group{cycled}: NLCG's {REFUSED['momentum']}; leave it out"
                )
            if self.metric is not None and (group["damping"] != OF_CURVATURE["damping"] or "refresh" in group):
                raise ValueError(f"damping or refresh in a group: {self.metric.name} has neither; leave them out")
        rates = {group["lr"] for group in self.param_groups}
        if isinstance(self.search, CurvatureStep) and (len(rates) > 1 or max(rates) > 1):
            raise ValueError(f"lr={sorted(rates)}: CurvatureStep() takes one factor up to 1 for all parameters")

    def _memory(self) -> SearchMemory:
        if not hasattr(self, "storage"):
            return SearchMemory()
        return SearchMemory(*self.storage.table("scalars").rows[0])

    def fresh_state(self, cell: LayerState, rank: int | None) -> dict[nn.Parameter, dict[str, Any]]:
        states = super().fresh_state(cell, rank)
        states[cell.layer.parameters[0]]["scalars"] = self._memory().tensor()
        return states

    @property
    def multiplier(self) -> float:
        """B in [1e-4, 1], by which the loss holds the learning rate back."""
        return self.memory.multiplier

    @property
    def memory(self) -> SearchMemory:
        """What is remembered of the steps that were made, beside vectors."""
        self.readings.read()
        return self._memory()

    @property
    def last_beta(self) -> float:
        """How much of its last direction the last step kept."""
        self.readings.read()
        return self.conjugate.used

    repeats_loss: ClassVar[bool] = True

    @property
    def hears_loss(self) -> bool:
        """Whether the loss holds the learning rate back."""
        return self.search.feedback is not None

    def _deaf(self) -> str:
        return str(self.search)

    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Tensor] | None = None,
        *,
        loss: Tensor | float | None = None,
        forward: Callable[[], Tensor] | None = None,
    ) -> Tensor | None:
        """One update.

        closure: called once; its loss is told and returned. loss: this rank's loss, mean over its samples (its sum with
        reduction="sum"). forward: with CurvatureStep(), gives the model's outputs on this rank's samples once more.
        """
        validation.function("closure", closure)
        wants = isinstance(self.search, CurvatureStep)
        if wants != (forward is not None):
            raise ValueError(
                "step=CurvatureStep() looks along the direction: call step(forward=lambda: model(x))"
                if wants
                else f"step(forward=...): {self.search} takes no more forward passes; leave it out"
            )
        self._check_groups()
        self._forward = forward
        try:
            return super().step(closure, loss=loss)
        finally:
            self._forward = self._heard = None

    def _ask(self) -> None:
        """Ask for the mean loss over ranks, L2 penalty included."""
        self._heard = None
        if not self.hears_loss:
            return
        if self._loss is None:
            self.say(
                "NLCG was told no loss, so it follows its schedule alone: call step(loss=loss), or pass "
                "step=Scheduled(feedback=None)",
                "no loss",
            )
        size, told = self.world.size, self._own_loss()
        penalty = self._penalty()
        if penalty is not None:
            told[0] += penalty.to(told.device) * (size / self.step_world.copies)
        if size > 1:
            told /= size
        self.world.sum([told], "scalars")

        def hear(numbers: Tensor) -> None:
            loss, everybody = numbers.tolist()
            self._heard = loss if everybody > 1 - 1e-9 else None

        self.readings.ask(told, hear)

    def _penalty(self) -> Tensor | None:
        """The sum of weight_decay |w|^2 / 2 over the parameters that this rank owns; None: nothing decays."""
        if not any(group["weight_decay"] for group in self.param_groups):
            return None
        weighed = [
            (decay, promote(p.detach()))
            for k in (k for mine in self.storage.mine for k in mine)
            for p in self.storage.cells[k].layer.parameters
            if (decay := self.group_of(p)["weight_decay"])
        ]
        if not weighed:
            return None
        norms = together(torch._foreach_norm([p for _, p in weighed]))
        return to_device([decay / 2 for decay, _ in weighed], norms.device) @ norms.square()

    def _probe(self, parts: dict[nn.Parameter, Tensor]) -> None:
        """With CurvatureStep(), make the directions of all parameters as long as they should be."""
        if not isinstance(self.search, CurvatureStep):
            return
        before, memory = self._memory(), self.memory  # that of this step now: the length needs its slope
        decays = [self.group_of(p)["weight_decay"] for p in parts]
        how = self.method.reduction == "sum", self.engine.predictions
        try:
            factor = minimum(self.search, self._model, self._forward, parts, decays, -memory.slope, self.world, *how)
        except Exception:
            self._remember(before)
            raise
        for part in parts.values():
            part.mul_(factor)
        self._remember(replace(memory, length=factor))

    def _remember(self, memory: SearchMemory) -> None:
        """Write down what a step has left, on every rank."""
        self.storage.table("scalars").fill(memory.tensor())

    def coverage(self) -> CoverageTable:
        """A row for every layer: its preconditioner, why, its size and cost. Printed, it is a table."""
        vectors, name = len(self.conjugate.keys), None if self.metric is None else self.metric.name
        rows = CoverageTable()
        for row, cell in zip(super().coverage(), self.cells):
            size = max(cell.layer.parameters[0].element_size(), 4) * cell.layer.shape.numel
            counted = 2 if isinstance(cell.layer, UncurvedParameter) else 1  # vectors of a fallback, of a momentum
            row = replace(row, bytes=row.bytes + (vectors - counted) * size)
            rows.append(row if name is None else replace(row, curvature=name))
        return rows


def bare(layer: Layer, rows_per_dim: int | None, max_size: int) -> Curvature:
    """Nothing is measured: the metric is learned from mean gradients."""
    return Identity()
