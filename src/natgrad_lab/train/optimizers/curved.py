"""SP-NGD and K-FAC as numbers: every choice that natgrad.SPNGD and natgrad.KFAC offer, by name."""

from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import natgrad
from natgrad.optim import LayerBlocks, SecondOrder, directions, step_size
from natgrad.optim.directions import Momentum
from natgrad.parallel import World
from natgrad.refresh import Adaptive, Budget, Staleness
from natgrad_lab.train.optimizers.settings import Settings

COEFFICIENTS = {"corrected": directions.corrected, "tied": directions.tied, "heavy_ball": directions.heavy_ball}
BOUNDS = {"kl_clip": natgrad.KLClip, "measured_change": natgrad.MeasuredChange}
LENGTHS = {"plain": step_size.plain, "trust": step_size.trust, **{name: kind() for name, kind in BOUNDS.items()}}
LengthName = Literal["plain", "trust", "kl_clip", "measured_change"]
NORMS = {"unitwise": natgrad.curvature.UnitWise, "full": natgrad.curvature.Full}
"""What normalisations get, by the name that a recipe gives; another kind of block is one more entry here."""
INVERSES = {"cholesky": natgrad.curvature.Kronecker, "eigen": natgrad.curvature.EigenKronecker}
WIRES = {None: None, "float16": torch.float16, "bfloat16": torch.bfloat16}


def how_far(length: str, largest_change: float | None = None) -> step_size.StepSize | step_size.Remembers:
    """The length as a function."""
    if largest_change is None:
        return LENGTHS[length]
    if length not in BOUNDS:
        raise ValueError(
            f"largest_change={largest_change:g} says nothing to length={length}; set --optimizer.length measured_change"
        )
    return BOUNDS[length](largest_change)


def limited(rule: int | Staleness, share: float | None) -> int | Staleness:
    """The rule, where asked for under a budget."""
    return rule if share is None else Budget(share, rule)


@dataclass(frozen=True)
class Curved(Settings):
    """What SP-NGD and K-FAC have in common."""

    momentum: float = 0.7
    """Share of the last direction that is repeated."""
    damping: float = 3e-4
    """Added to the curvature before it is inverted, split between the two factors."""
    weight_decay: float = 0.0
    """Strength of the L2 penalty."""
    fisher: Literal["empirical", "sampled"] = "empirical"
    """Labels of the curvature: the data's, or drawn from the prediction at one more backward pass a measurement."""
    refresh: int | None = None
    """Measure every so many steps; None: each statistic when it has changed by more than `tolerance`."""
    tolerance: float = 0.1
    """Relative change of a statistic that counts as change, quoted at 4,096 measured samples."""
    widen_below: int = 4096
    """Samples in a step below which `tolerance` grows as 1/sqrt(samples), for sampling noise; 1: it never does."""
    limit: int | None = None
    """The longest interval in steps where `refresh` is None; None: no limit."""
    refresh_share: float | None = None
    """Share of a step that measuring and factoring may take, counted in operations: what is due and does not fit waits;
    None: no limit."""
    ema_decay: float = 0.0
    """Share of the old average that a refresh keeps; 0: each measurement replaces the last."""
    rows_per_dim: int | None = 8
    """Rows measured for each dimension of a statistic; None: every row."""
    inverse: Literal["cholesky", "eigen"] = "cholesky"
    """How factors are inverted; eigenvectors are dearer, but follow every change of the damping."""
    norms: Literal["unitwise", "full", "plain"] = "unitwise"
    """Curvature of normalisations: a 2x2 block for each channel, one block for all of a layer, or none."""
    norm_damping: float = 1.0
    """Damping of normalisations, as a multiple of the others' (the release: 16)."""
    max_size: int = 8192
    """A side of a layer above this many dimensions keeps the diagonal of its factor only."""
    length: LengthName = "measured_change"
    """How far a step goes along its direction."""
    largest_change: float | None = None
    """Twice the change of the output (KL) above which a step is shortened; None: 0.25 as it is measured, 0.01 as it is
    predicted."""
    coefficient: Literal["corrected", "tied", "heavy_ball"] = "corrected"
    """Momentum as the learning rate falls: corrected keeps it, tied lets it fall alike (the paper)."""
    before: bool = False
    """Average gradients and precondition the average, instead of averaging preconditioned gradients."""
    displaced: bool = False
    """Repeat a weight's whole last displacement, rescaling included (the paper), instead of its direction."""
    decoupled: bool = False
    """Decay weights beside the direction, as AdamW does; False: as a part of it, as the comparison was tuned."""
    rescale: Literal["always", "shrink"] | None = None
    """Hold each weight at the norm it had at initialisation (always, or only when it has grown)."""
    max_norm: float | None = None
    """Norm to which the mean gradient of all parameters is clipped; None: no clipping."""
    strict: bool = False
    """Refuse a network with parameters that have no curvature, instead of training these by Adam's direction."""
    wire: Literal["float16", "bfloat16"] | None = None
    """Type in which statistics travel; None: their own."""
    weights_wire: Literal["float16", "bfloat16"] | None = None
    """Type in which owners send new weights or directions; None: their own."""
    overlap: bool = False
    """Send gradients while the backward pass runs."""
    graph: bool = False
    """Record a step's launches once and make them again as CUDA graphs, on GPUs."""
    per_host: int | None = None
    """Ranks of a host, where messages go inside of hosts first and then between them; None: in one ring."""
    sampling_seed: int = 0
    """Decides which rows are measured and which labels are drawn."""

    def before_backward(self, optimizer: Optimizer, output: Tensor) -> None:
        if self.fisher == "sampled" and isinstance(optimizer, SecondOrder):
            optimizer.sample(output)

    def arguments(self, world: World) -> dict[str, Any]:
        """What SPNGD and KFAC are called with, beside the model and the learning rate."""
        return {
            "momentum": self.momentum,
            "damping": self.damping,
            "weight_decay": self.weight_decay,
            "fisher": self.fisher,
            "refresh": self.staleness(),
            "ema_decay": self.ema_decay,
            "rows_per_dim": self.rows_per_dim,
            "curvature": self.blocks(),
            "max_size": self.max_size,
            "length": how_far(self.length, self.largest_change),
            "rule": Momentum(self.before, COEFFICIENTS[self.coefficient], self.displaced, self.decoupled),
            "rescale": self.rescale,
            "max_norm": self.max_norm,
            "strict": self.strict,
            "seed": self.sampling_seed,
            "graph": self.graph,
            "world": World(
                world.transport,
                wire=WIRES[self.wire],
                weights=WIRES[self.weights_wire],
                overlap=self.overlap,
                per_host=self.per_host,
                check=world.check,
            ),
        }

    def blocks(self) -> LayerBlocks:
        """The curvature of every kind of layer."""
        if self.norms == "plain":
            if self.norm_damping != 1:
                raise ValueError(
                    f"norm_damping={self.norm_damping:g} says nothing to norms=plain; set --optimizer.norms unitwise"
                )
            return LayerBlocks(INVERSES[self.inverse], natgrad.curvature.Identity)
        if not self.norm_damping > 0:
            raise ValueError(f"norm_damping={self.norm_damping:g} must be positive; set --optimizer.norm-damping")
        return LayerBlocks(INVERSES[self.inverse], partial(NORMS[self.norms], coefficient=self.norm_damping))

    def staleness(self) -> int | Staleness:
        """When statistics are measured again, and how much of a step that may take."""
        return limited(self.rule(), self.refresh_share)

    def rule(self) -> int | Staleness:
        """When statistics are due; numbers of the adaptive rule beside a fixed interval are refused."""
        if self.refresh is None:
            return Adaptive(self.tolerance, self.widen_below, self.limit)
        unset = {entry.name: entry.default for entry in fields(Curved)}
        for name in ("tolerance", "widen_below", "limit"):
            if getattr(self, name) != unset[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)} belongs to the adaptive rule, but refresh={self.refresh} is fixed; "
                    "set --optimizer.refresh None"
                )
        return self.refresh


@dataclass(frozen=True)
class SpNgd(Curved):
    """SP-NGD: natural gradient with Kronecker factors, refreshed when they have changed."""

    def build(self, model: nn.Module, world: World) -> Optimizer:
        return natgrad.SPNGD(model, self.lr, **self.arguments(world))


@dataclass(frozen=True)
class KFac(Curved):
    """K-FAC: Kronecker factors averaged over measurements."""

    ema_decay: float = 0.5
    """Share of the old average that a refresh keeps."""
    norms: Literal["unitwise", "full", "plain"] = "plain"
    """Curvature of normalisations: a 2x2 block for each channel, one block for all of a layer, or none."""
    gather: Literal["weights", "directions"] = "weights"
    """What owners send to everyone: new weights, or directions for every rank to apply (the paper of 2019)."""

    def build(self, model: nn.Module, world: World) -> Optimizer:
        return natgrad.KFAC(model, self.lr, gather=self.gather, **self.arguments(world))
