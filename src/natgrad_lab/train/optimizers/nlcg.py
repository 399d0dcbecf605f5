"""NLCG as numbers: every choice that natgrad.NLCG offers, by name."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.optim import Optimizer

import natgrad
from natgrad.optim import SecondOrder
from natgrad.optim.betas import BETAS
from natgrad.parallel import World
from natgrad_lab.train.optimizers.curved import INVERSES, NORMS, WIRES, limited
from natgrad_lab.train.optimizers.settings import Settings

METRICS = {"bfgs": natgrad.DiagonalBFGS(), "identity": None, "second_moment": natgrad.SecondMoment()}
OF_CURVATURE = (
    "damping",
    "refresh",
    "refresh_share",
    "ema_decay",
    "rows_per_dim",
    "fisher",
    "inverse",
    "norms",
    "max_size",
    "sampling_seed",
)
"""Fields that only a curvature hears."""


@dataclass(frozen=True)
class Nlcg(Settings):
    """NLCG: conjugate directions on a preconditioner, held back when the loss grows."""

    lr: float = 0.1
    """Ceiling of the step, which the schedule multiplies; with step curvature a factor up to 1."""
    weight_decay: float = 0.0
    """Strength of an L2 penalty that is part of the loss: in the gradient and in what is heard of the loss."""
    decay_norms: bool = True
    """Whether the penalty includes the scales and shifts of BatchNorm (the release: no)."""
    preconditioner: Literal["bfgs", "identity", "second_moment", "kronecker"] = "bfgs"
    """What gradients are divided by: diagonal BFGS (the release), nothing, Adam's root mean square, K-FAC."""
    beta: Literal["fletcher_reeves", "polak_ribiere", "hestenes_stiefel", "dai_yuan", "hs_dy", "hager_zhang"] = (
        "fletcher_reeves"
    )
    """How much of the last direction is kept."""
    beta_max: float = 1.0
    """The most of it that is kept."""
    step: Literal["scheduled", "curvature"] = "scheduled"
    """How long steps are: the learning rate, or the minimum along the direction by two more forward passes."""
    feedback: Literal["step", "online"] | None = "step"
    """With step scheduled, how the loss holds steps back: every `period` steps, in every step, or not."""
    period: int = 5
    """Steps between two looks at the loss."""
    tau: float = 1.0
    """Per cent by which the loss may grow before steps shrink."""
    mu: float = 1e-3
    """With step curvature, added to the curvature along the direction."""
    change: float | None = 0.5
    """With step curvature, twice the change of the outputs (KL) beyond which no step goes; None: no bound."""
    mode: Literal["hardened", "faithful"] = "hardened"
    """Faithful: the authors' release to the letter."""
    prescale: float | None = None
    """Share of a weight's norm to which its gradient is brought first (0.001 in the release); None: off."""
    damping: float = 1e-2
    """With preconditioner kronecker, as the fields below: added to the curvature before it is inverted."""
    refresh: int = 1
    """Measure every so many steps."""
    refresh_share: float | None = None
    """Share of a step that measuring and factoring may take, counted in operations: what is due and does not fit waits;
    None: no limit."""
    ema_decay: float = 0.9
    """Share of the old average that a refresh keeps."""
    rows_per_dim: int | None = 8
    """Rows measured for each dimension of a statistic; None: every row."""
    fisher: Literal["empirical", "sampled"] = "empirical"
    """Labels of the curvature: the data's, or drawn from the prediction at one more backward pass a measurement."""
    inverse: Literal["cholesky", "eigen"] = "cholesky"
    """How factors are inverted."""
    norms: Literal["unitwise", "full", "plain"] = "unitwise"
    """Curvature of normalisations: a 2x2 block for each channel, one block for all of a layer, or none."""
    max_size: int = 8192
    """A side of a layer above this many dimensions keeps the diagonal of its factor only."""
    sampling_seed: int = 0
    """Decides which rows are measured and which labels are drawn."""
    max_norm: float | None = None
    """Norm to which the mean gradient of all parameters is clipped; None: no clipping."""
    wire: Literal["float16", "bfloat16"] | None = None
    """With preconditioner kronecker: type in which statistics travel; None: their own."""
    weights_wire: Literal["float16", "bfloat16"] | None = None
    """Type in which owners send new weights or directions; None: their own."""
    overlap: bool = False
    """Send gradients while the backward pass runs."""
    per_host: int | None = None
    """Ranks of a host, where messages go inside of hosts first and then between them; None: in one ring."""

    @property
    def looks_again(self) -> bool:
        return self.step == "curvature"

    def build(self, model: nn.Module, world: World) -> Optimizer:
        return natgrad.NLCG(model, self.lr, **self.arguments(model, world))

    def before_backward(self, optimizer: Optimizer, output: Tensor) -> None:
        if self.fisher == "sampled" and isinstance(optimizer, SecondOrder):
            optimizer.sample(output)

    def take(self, optimizer: Any, loss: Tensor, again: Callable[[], Tensor]) -> None:
        if self.step == "curvature":
            optimizer.step(forward=again)
        elif self.feedback is None:
            optimizer.step()
        else:
            optimizer.step(loss=loss)

    def arguments(self, model: nn.Module, world: World) -> dict[str, Any]:
        """What NLCG is called with, beside the model and the learning rate."""
        return {
            "weight_decay": self.weight_decay,
            "params": self.groups(model),
            "beta": BETAS[self.beta],
            "beta_max": self.beta_max,
            "step": self.how_far(),
            "mode": self.mode,
            "prescale": self.prescale,
            "max_norm": self.max_norm,
            "world": World(
                world.transport,
                wire=WIRES[self.wire],
                weights=WIRES[self.weights_wire],
                overlap=self.overlap,
                per_host=self.per_host,
                check=world.check,
            ),
            **self.metric(),
        }

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
            return natgrad.CurvatureStep(mu=self.mu, change=self.change)
        self._unheard(("mu", "change"), "step=scheduled")
        return natgrad.Scheduled(self.feedback, self.period, self.tau)

    def metric(self) -> dict[str, Any]:
        """The preconditioner, with the curvature's numbers if it is one; else these are refused."""
        if self.preconditioner != "kronecker":
            self._unheard((*OF_CURVATURE, "wire"), f"preconditioner={self.preconditioner}, which measures nothing")
            return {"preconditioner": METRICS[self.preconditioner]}
        norms: Any = natgrad.curvature.Identity if self.norms == "plain" else NORMS[self.norms]
        return {
            "preconditioner": natgrad.LayerBlocks(INVERSES[self.inverse], norms),
            "damping": self.damping,
            "refresh": limited(self.refresh, self.refresh_share),
            "ema_decay": self.ema_decay,
            "rows_per_dim": self.rows_per_dim,
            "fisher": self.fisher,
            "max_size": self.max_size,
            "seed": self.sampling_seed,
        }

    def _unheard(self, names: tuple[str, ...], why: str) -> None:
        unset = {entry.name: entry.default for entry in fields(Nlcg)}
        for name in names:
            if getattr(self, name) != unset[name]:
                raise ValueError(f"{name}={getattr(self, name)} says nothing to {why}; leave --optimizer.{name} out")
