"""SENG as numbers: every choice that natgrad.SENG offers, by name."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

import natgrad
from natgrad.optim.directions import Momentum
from natgrad.parallel import World
from natgrad_lab.train.optimizers.curved import COEFFICIENTS, WIRES, LengthName, how_far, limited
from natgrad_lab.train.optimizers.settings import Settings

SKETCHES = {
    "count": natgrad.curvature.CountSketch,
    "uniform": natgrad.curvature.Uniform,
}
LEGACY = ("legacy_c", "legacy_threshold", "legacy_mean_field", "legacy_local")


@dataclass(frozen=True)
class Seng(Settings):
    """SENG: natural gradient in the space of samples. With length=plain lr / damping is SGD's learning rate."""

    momentum: float = 0.7
    """Share of the last direction that is repeated."""
    damping: float = 0.01
    """Added to the curvature, absolute; a new value acts at once."""
    weight_decay: float = 0.0
    """Strength of the L2 penalty, added after preconditioning."""
    refresh: int = 4
    """Measure every so many steps."""
    refresh_share: float | None = None
    """Share of a step that measuring and factoring may take, counted in operations: what is due and does not fit waits;
    None: no limit."""
    samples: int | None = 256
    """Samples whose gradients make up the curvature, drawn from all ranks' batch; None: all."""
    sketch: Literal["count", "uniform"] | None = "count"
    """The map to fewer numbers, by which gradients of large layers are compared; None: exact products."""
    sketch_size: int | None = None
    """To how many numbers; None: 16 for each sample."""
    rank: int | None = None
    """Places to which the factors of large layers are cut for these products; None: all."""
    columns: Literal["empirical", "improved"] = "empirical"
    """Gradients as they are, or each over the norm of the gradient of its logits (the improved Fisher)."""
    block: Literal["layer", "network"] = "layer"
    """One solve for each layer, or one for the whole network."""
    budget: int = 2**30
    """Bytes of one layer's columns; a layer that would need more gets fewer samples."""
    legacy: bool = False
    """Scale sampled curvature as the release does, whose hyper-parameters were tuned with it."""
    legacy_c: int = 256
    """Column budget c of the release's scaling."""
    legacy_threshold: int = 700_000
    """Weights above which the release samples a layer by its sides."""
    legacy_mean_field: bool = False
    """Take U b of layers above the threshold from sums of factors alone, as the release does."""
    legacy_local: bool = False
    """Average the directions of every rank's own samples, as the release does."""
    length: LengthName = "measured_change"
    """How far a step goes along its direction."""
    largest_change: float | None = None
    """Twice the change of the output (KL) above which a step is shortened; None: 0.25 as it is measured, 0.01 as it is
    predicted."""
    coefficient: Literal["corrected", "tied", "heavy_ball"] = "corrected"
    """Momentum as the learning rate falls: corrected keeps it, tied lets it fall alike."""
    before: bool = False
    """Average gradients and precondition the average, instead of averaging preconditioned gradients."""
    displaced: bool = False
    """Repeat a weight's whole last displacement, rescaling included, instead of its direction."""
    decoupled: bool = False
    """Decay weights beside the direction, as AdamW does; False: as a part of it, as the comparison was tuned."""
    rescale: Literal["always", "shrink"] | None = None
    """Hold each weight at the norm it had at initialisation (always, or only when it has grown)."""
    max_norm: float | None = None
    """Norm to which the mean gradient of all parameters is clipped; None: no clipping."""
    strict: bool = False
    """Refuse a network with parameters that have no curvature, instead of training these by Adam's direction."""
    replicated: bool = False
    """Keep all columns on every rank instead of each layer's at its owner: memory and work are not divided."""
    wire: Literal["float16", "bfloat16"] | None = None
    """Type in which statistics travel; None: their own."""
    weights_wire: Literal["float16", "bfloat16"] | None = None
    """Type in which owners send new weights; None: their own."""
    overlap: bool = False
    """Send gradients while the backward pass runs."""
    per_host: int | None = None
    """Ranks of a host, where messages go inside of hosts first and then between them; None: in one ring."""
    sampling_seed: int = 0
    """Decides which samples are taken and which sketches are drawn."""

    def build(self, model: nn.Module, world: World) -> Optimizer:
        self.fit()
        return natgrad.SENG(
            model,
            self.lr,
            momentum=self.momentum,
            damping=self.damping,
            weight_decay=self.weight_decay,
            refresh=limited(self.refresh, self.refresh_share),
            samples=self.samples,
            sketch=None if self.sketch is None else SKETCHES[self.sketch](self.sketch_size),
            rank=self.rank,
            columns=self.columns,
            block=self.block,
            budget=self.budget,
            legacy=self.release(),
            length=how_far(self.length, self.largest_change),
            rule=Momentum(self.before, COEFFICIENTS[self.coefficient], self.displaced, self.decoupled),
            rescale=self.rescale,
            max_norm=self.max_norm,
            strict=self.strict,
            seed=self.sampling_seed,
            world=self.ranks(world),
        )

    def release(self) -> natgrad.curvature.Legacy | None:
        """The release's ways, where they are asked for."""
        if not self.legacy:
            return None
        return natgrad.curvature.Legacy(self.legacy_c, self.legacy_threshold, self.legacy_mean_field, self.legacy_local)

    def ranks(self, world: World) -> World:
        """The same ranks, with these settings' messages."""
        return World(
            world.transport,
            wire=WIRES[self.wire],
            weights=WIRES[self.weights_wire],
            overlap=self.overlap,
            owners=not self.replicated,
            per_host=self.per_host,
            check=world.check,
        )

    def fit(self) -> None:
        """Raise a ValueError for values that say nothing, or that do not go together."""
        if self.sketch is None and self.sketch_size is not None:
            raise ValueError(
                f"sketch_size={self.sketch_size} says nothing to sketch=None; set --optimizer.sketch count"
            )
        if self.refresh_share is not None and self.block == "network":
            raise ValueError(
                f"refresh_share={self.refresh_share:g} measures layers in different steps, but block=network needs all "
                "layers' columns of one step; set --optimizer.block layer"
            )
        unset: dict[str, Any] = {entry.name: entry.default for entry in fields(Seng)}
        for name in LEGACY:
            if not self.legacy and getattr(self, name) != unset[name]:
                raise ValueError(f"{name}={getattr(self, name)} says nothing to legacy=False; set --optimizer.legacy")
        if self.legacy_local and not self.replicated:
            raise ValueError("legacy_local takes each rank's own directions; set --optimizer.replicated")
        if self.legacy_local and self.block == "network":
            raise ValueError("legacy_local averages directions of layers; set --optimizer.block layer")
        if self.replicated and self.weights_wire is not None:
            raise ValueError(f"weights_wire={self.weights_wire}: replicated ranks send no weights; leave one out")
