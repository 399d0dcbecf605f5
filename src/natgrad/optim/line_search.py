"""How long a conjugate step is: the learning rate held back by the loss, or the minimum along the direction.

Both are decided from numbers that all ranks share, so that no two ranks can decide differently.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

LEAST_MULTIPLIER = 1e-4
TABLE = (  # the loss has grown by more than this, times tau: shrink the multiplier, take back so much of the last step
    (0.15, 0.5, 0.9),
    (0.125, 0.7, 0.7),
    (0.10, 0.8, 0.5),
    (0.075, 0.9, 0.3),
    (0.05, 0.95, 0.2),
    (0.025, 0.975, 0.1),
    (0.01, 1.0, 0.1),
)


@dataclass(frozen=True)
class SearchMemory:
    """What NLCG remembers beside vectors: numbers that are the same on every rank."""

    steps: float = 0.0
    told: float = 0.0
    """Losses that were told so far."""
    delta: float = 0.0
    """g . q(g) of the last step."""
    slope: float = 0.0
    """d . g of the last step, below 0."""
    multiplier: float = 1.0
    """b, of the learning rate."""
    average: float = 0.0
    """E, of the loss."""
    reference: float = 0.0
    """E at the last comparison."""
    length: float = 1.0
    """What the last direction was multiplied by, beside the learning rate."""
    undone: float = 0.0
    """The share of an earlier step that the last step took back."""

    def tensor(self) -> Tensor:
        return torch.tensor([getattr(self, name) for name in self.__dataclass_fields__], dtype=torch.float64)

    @classmethod
    def of(cls, values: Tensor) -> SearchMemory:
        return cls(*values.tolist())


def answer(ratio: float, tau: float) -> tuple[float, float] | None:
    """(shrink, undo) for a loss that is `ratio` times what it was; None: it has not grown (the release)."""
    if not ratio >= 1 + 0.01 * tau:
        return None
    return next(((c, u) for edge, c, u in TABLE if ratio > 1 + tau * edge), (1.0, 0.0))


@dataclass(frozen=True)
class Scheduled:
    """The learning rate times a multiplier b in [1e-4, 1] that the loss moves (arXiv 1812.02886, its release).

    A loss that has not grown by tau % lets b recover (by 5 or 2 %); one that has shrinks b and takes back a share of
    the last step. Leave feedback off where a batch is less than about a sixteenth of the data.

    Args:
        feedback: how the loss holds steps back. "step" compares the running loss E <- 0.7 E + 0.3 L with E `period`
            steps ago, "online" L with E at every step, None leaves b at 1.
        period: steps between two looks at the loss, with feedback "step".
        tau: per cent by which the loss may grow before steps shrink.

    """

    feedback: Literal["step", "online"] | None = "step"
    period: int = 5
    tau: float = 1.0

    def __post_init__(self):
        if self.feedback not in ("step", "online", None):
            raise ValueError(f'Scheduled(feedback={self.feedback!r}): give "step", "online" or None')
        if self.feedback != "step" and self.period != Scheduled.period:
            raise ValueError(f'Scheduled(period={self.period}): only feedback="step" has a period')
        if self.feedback is None and self.tau != Scheduled.tau:
            raise ValueError(f"Scheduled(tau={self.tau}): without feedback nothing is compared")
        if not (isinstance(self.period, int) and self.period >= 1 and 0 < self.tau < math.inf):
            raise ValueError(f"Scheduled(period={self.period}, tau={self.tau}): give a whole number and one above 0")

    def hear(self, memory: SearchMemory, loss: float) -> SearchMemory:
        """The memory after a loss, with the new multiplier and `undone`."""
        first = memory.told == 0
        average = loss if first else 0.7 * memory.average + 0.3 * loss
        heard = replace(memory, told=memory.told + 1, average=average, undone=0.0)
        if first:
            return replace(heard, reference=loss)
        if self.feedback == "online":
            return self._compare(heard, loss, average, 1.02)
        if memory.steps % self.period:
            return heard
        return replace(self._compare(heard, average, memory.reference, 1.05), reference=average)

    def _compare(self, memory: SearchMemory, now: float, before: float, grow: float) -> SearchMemory:
        if before <= 0:  # a ratio to nothing, or of losses below zero, says nothing
            return memory
        found = answer(now / before, self.tau)
        if found is None:
            return replace(memory, multiplier=min(1.0, grow * memory.multiplier))
        shrink, undo = found
        return replace(memory, multiplier=max(shrink * memory.multiplier, LEAST_MULTIPLIER), undone=undo)


@dataclass(frozen=True)
class CurvatureStep:
    """The minimum along d of the Gauss-Newton model: lr (-g.d) / (d.G d + (weight decay + mu) d.d), with lr <= 1.

    It needs no learning rate; lr = 1 takes all of it. d.G d comes from two more forward passes at w +- e d, with
    e = `probe` |w| / |d|: `step(forward=lambda: model(x))`. The bound `change` is ours: far from w the model says
    nothing, and a direction that old statistics have made long looks flat at w.

    Args:
        output: "softmax" for cross entropy of logits [n, classes, ...], a mean over n and all places (or over n times
            `predictions`), "squared" for half the squared error, a mean over n.
        mu: added, with the weight decay, to the curvature along the direction.
        probe: distance of the two forward passes from the weights, as a share of the weights' norm.
        limit: length of the longest step, as a multiple of the direction.
        change: mean change t^2 d.G d of the outputs, twice the KL divergence of softmax outputs, beyond which no step
            goes; None: no such bound, as for squared errors, whose scale is the user's.

    """

    output: Literal["softmax", "squared"] = "softmax"
    mu: float = 1e-3
    probe: float = 1e-3
    limit: float = 1e3
    change: float | None = 0.5
    feedback = None

    def __post_init__(self):
        if self.output not in ("softmax", "squared"):
            raise ValueError(f'CurvatureStep(output={self.output!r}): give "softmax" or "squared"')
        if not (self.mu >= 0 and self.probe > 0 and self.limit > 0):
            raise ValueError(
                f"CurvatureStep(mu={self.mu}, probe={self.probe}, limit={self.limit}): "
                "give mu of at least 0, the others above 0"
            )
        if self.change is not None and not self.change > 0:
            raise ValueError(f"CurvatureStep(change={self.change}): give a change of the outputs above 0, or None")

    def longest(self, bent: float) -> float:
        """The longest step along a direction with d.G d = bent."""
        if self.change is None or self.output == "squared" or not bent > 0:
            return self.limit
        return min(self.limit, math.sqrt(self.change / bent))


def quadratic(output: str, logits: Tensor, tangent: Tensor) -> Tensor:
    """The sum over samples of J^T H J [scalar], H the Hessian of the loss in its outputs, J their change along d."""
    if output == "squared":
        return tangent.square().sum()
    if logits.dim() < 2:
        raise ValueError(
            f"forward() gave outputs of shape {tuple(logits.shape)}: logits are [n, classes, ...]; for squared errors "
            'take CurvatureStep(output="squared")'
        )
    p = logits.softmax(1)
    mean = (p * tangent).sum(1)
    return (p * tangent.square()).sum() - mean.square().sum()
