"""NLCG: every choice that natgrad.NLCG offers, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.optim import Optimizer

import natgrad
from natgrad.optim.betas import BETAS
from natgrad.parallel import World
from natgrad_lab.train.optimizers.composed import Measurements, Messages, limited
from natgrad_lab.train.optimizers.derived import Reasons, argument, declared

METRICS = {
    "bfgs": natgrad.DiagonalBFGS(),
    "identity": None,
    "second_moment": natgrad.SecondMoment(),
    "kronecker": natgrad.spngd_blocks,
}
STEPS = {"scheduled": natgrad.Scheduled, "curvature": natgrad.CurvatureStep}
OF_CURVATURE = {name: origin for name, _, origin in declared(Measurements)}
"""Fields that only a curvature hears, and the arguments that they stand for."""


@dataclass(frozen=True)
class Nlcg(Messages, Measurements, of=natgrad.NLCG):
    """NLCG: conjugate directions on a preconditioner, held back when the loss grows."""

    lr: float = 0.1
    """Ceiling of the step, which the schedule multiplies; with step curvature a factor up to 1."""
    weight_decay: float = argument()
    decay_norms: bool = True
    """Whether the penalty includes the scales and shifts of BatchNorm (the release: no)."""
    preconditioner: Literal["bfgs", "identity", "second_moment", "kronecker"] = argument(choices=METRICS)
    beta: Literal["fletcher_reeves", "polak_ribiere", "hestenes_stiefel", "dai_yuan", "hs_dy", "hager_zhang"] = (
        argument(choices=BETAS)
    )
    beta_max: float = argument()
    step: Literal["scheduled", "curvature"] = argument(choices=STEPS)
    feedback: Literal["step", "online"] | None = argument(natgrad.Scheduled)
    period: int = argument(natgrad.Scheduled)
    tau: float = argument(natgrad.Scheduled)
    mu: float = argument(natgrad.CurvatureStep)
    change: float | None = argument(natgrad.CurvatureStep)
    mode: Literal["hardened", "faithful"] = argument()
    prescale: float | None = argument()
    refresh: int = argument()
    max_norm: float | None = argument()

    left_out: ClassVar[Reasons] = {
        "CurvatureStep.output": "the loop's loss is cross entropy",
        "CurvatureStep.probe": "rounding decides it, not the task",
        "CurvatureStep.limit": "`change` bounds the step",
        "strict": "its metric takes all parameters",
        "graph": "recorded steps are tested for SP-NGD and K-FAC",
    }

    @property
    def looks_again(self) -> bool:
        return self.step == "curvature"

    @property
    def cuttable(self) -> bool:
        return True

    def build(self, model: nn.Module, world: World) -> Optimizer:
        return self.makes(model, self.lr, params=self.groups(model), **self.arguments(world))  # type: ignore[call-arg]

    def take(self, optimizer: Any, loss: Tensor, again: Callable[[], Tensor]) -> None:
        if self.step == "curvature":
            optimizer.step(forward=again)
        elif self.feedback is None:
            optimizer.step()
        else:
            optimizer.step(loss=loss)

    def arguments(self, world: World) -> dict[str, Any]:
        given = {**super().arguments(world), "step": self.how_far()}
        if self.preconditioner != "kronecker":
            why = f"preconditioner={self.preconditioner}, which measures nothing"
            self._unheard((*OF_CURVATURE, "wire"), why)
            unheard = {origin.name or name for name, origin in OF_CURVATURE.items()}
            return {name: value for name, value in given.items() if name not in unheard}
        blocks = natgrad.LayerBlocks(**self.given(natgrad.LayerBlocks))
        return {**given, "preconditioner": blocks, "refresh": limited(self.refresh, self.refresh_share)}

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The parameters that the penalty includes, and those that it does not."""
        norms = {p for m in model.modules() if isinstance(m, BatchNorm) for p in m.parameters()}
        if self.decay_norms or not norms:
            return [{"params": list(model.parameters())}]
        others = [p for p in model.parameters() if p not in norms]
        free = {"params": [p for p in model.parameters() if p in norms], "weight_decay": 0.0}
        return [{"params": others}, free]

    def how_far(self) -> natgrad.Scheduled | natgrad.CurvatureStep:
        """The step size as an object; numbers of the other kind are refused."""
        if self.step == "curvature":
            self._unheard(("feedback", "period", "tau"), "step=curvature, which looks ahead instead of back")
            return natgrad.CurvatureStep(**self.given(natgrad.CurvatureStep))
        self._unheard(("mu", "change"), "step=scheduled")
        return natgrad.Scheduled(**self.given(natgrad.Scheduled))

    def _unheard(self, names: tuple[str, ...], why: str) -> None:
        if name := self.changed(*names):
            raise ValueError(f"{name}={getattr(self, name)} says nothing to {why}; leave --optimizer.{name} out")
