"""Arguments that are objects: their numbers as fields, and how the objects are made of these.

Each class has the fields of one topic. The defaults are those of the optimizer whose settings inherit from it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

import natgrad
from natgrad.optim import LayerBlocks, SecondOrder, directions, step_size
from natgrad.optim.directions import Momentum
from natgrad.parallel import World
from natgrad.refresh import Budget, Staleness
from natgrad_lab.train.optimizers.derived import Derived, Reasons, argument

COEFFICIENTS = {"corrected": directions.corrected, "tied": directions.tied, "heavy_ball": directions.heavy_ball}
BOUNDS = {"kl_clip": natgrad.KLClip, "measured_change": natgrad.MeasuredChange}
LENGTHS = {"plain": step_size.plain, "trust": step_size.trust, **{name: kind() for name, kind in BOUNDS.items()}}
NORMS = {"unitwise": natgrad.curvature.UnitWise, "full": natgrad.curvature.Full, "plain": natgrad.curvature.Identity}
"""What normalisations get, by the name that a recipe gives; another kind of block is one more entry here."""
INVERSES = {"cholesky": natgrad.curvature.Kronecker, "eigen": natgrad.curvature.EigenKronecker}
DTYPES = {None: None, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Directions(Derived):
    """Where a step goes and how far: the arguments `rule` and `length`, and what is beside them."""

    momentum: float = argument()
    weight_decay: float = argument()
    length: Literal["plain", "trust", "kl_clip", "measured_change"] = argument(choices=LENGTHS)
    largest_change: float | None = argument(
        natgrad.MeasuredChange,
        "limit",
        default=None,
        note=f"None: {natgrad.MeasuredChange.limit:g} as measured, {natgrad.KLClip.limit:g} as kl_clip predicts it.",
    )
    coefficient: Literal["corrected", "tied", "heavy_ball"] = argument(Momentum, choices=COEFFICIENTS)
    before: bool = argument(Momentum)
    displaced: bool = argument(Momentum)
    decoupled: bool = argument(Momentum, default=False, note="The comparison was tuned without.")
    rescale: Literal["always", "shrink"] | None = argument()
    max_norm: float | None = argument()
    strict: bool = argument()

    left_out: ClassVar[Reasons] = {
        **dict.fromkeys(
            [f"MeasuredChange.{name}" for name in ("first", "least", "most", "memory")],
            "one number bounds a step's change",
        ),
        "MeasuredChange.share_of_loss": "the loop's loss, cross entropy, is never below 0",
        "fallback": "parameters without curvature train by Adam's direction",
    }

    def take(self, optimizer: Any, loss: Tensor, again: Any) -> None:
        optimizer.step(loss=loss) if optimizer.hears_loss else optimizer.step()

    def how_far(self) -> step_size.StepSize | step_size.Remembers:
        """The length as a function, or as an object that learns."""
        if self.largest_change is None:
            return LENGTHS[self.length]
        if self.length not in BOUNDS:
            raise ValueError(
                f"largest_change={self.largest_change:g} says nothing to length={self.length}; "
                "set --optimizer.length measured_change"
            )
        return BOUNDS[self.length](self.largest_change)

    def arguments(self, world: World) -> dict[str, Any]:
        return {**super().arguments(world), "length": self.how_far(), "rule": Momentum(**self.given(Momentum))}


@dataclass(frozen=True)
class Measurements(Derived):
    """The curvature of layers: how it is measured, averaged, inverted and damped."""

    damping: float = argument()
    fisher: Literal["empirical", "sampled"] = argument()
    refresh: int | None = argument()
    refresh_share: float | None = argument(Budget, "share", default=None, note="None: no limit.")
    ema_decay: float = argument()
    rows_per_dim: int | None = argument()
    inverse: Literal["cholesky", "eigen"] = argument(LayerBlocks, "matrix", choices=INVERSES)
    norms: Literal["unitwise", "full", "plain"] = argument(LayerBlocks, "norm", choices=NORMS, note="plain: Identity.")
    max_size: int = argument()
    sampling_seed: int = argument(name="seed")

    left_out: ClassVar[Reasons] = {"Budget.then": "it is `refresh`"}

    def before_backward(self, optimizer: Optimizer, output: Tensor) -> None:
        if self.fisher == "sampled" and isinstance(optimizer, SecondOrder):
            optimizer.sample(output)


def limited(rule: int | Staleness, share: float | None) -> int | Staleness:
    """The rule, where asked for under a budget."""
    return rule if share is None else Budget(share, rule)


@dataclass(frozen=True)
class Messages(Derived):
    """What travels between ranks, and when: the argument `world`."""

    wire: Literal["float16", "bfloat16"] | None = argument(World, choices=DTYPES)
    weights_wire: Literal["float16", "bfloat16"] | None = argument(World, "weights", choices=DTYPES)
    overlap: bool = argument(World)
    per_host: int | None = argument(World)

    left_out: ClassVar[Reasons] = {
        **dict.fromkeys(("World.group", "World.timeout", "World.check"), "the launcher's"),
        "World.gradients": "the loop's gradients are every rank's own",
        "World.owners": "ranks that are alike keep the same; see Seng.replicated",
        "params": "a recipe trains all of a network",
        "reduction": "the loop's loss is a mean",
        "predictions": "the loop's loss is a mean over a sample's predictions",
        "batch_dim": "the loop's inputs have samples first",
        "scaler": "the loop's precision decides",
    }

    def arguments(self, world: World) -> dict[str, Any]:
        return {**super().arguments(world), "world": self.ranks(world)}

    def ranks(self, world: World) -> World:
        """The same ranks, with these settings' messages."""
        return World(world.transport, check=world.check, **self.given(World))
