"""SENG: every choice that natgrad.SENG offers, by name."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import natgrad
from natgrad.parallel import World
from natgrad.refresh import Budget
from natgrad_lab.train.optimizers.composed import Directions, Messages, limited
from natgrad_lab.train.optimizers.derived import Reasons, argument

SKETCHES = {
    "count": natgrad.curvature.CountSketch,
    "uniform": natgrad.curvature.Uniform,
    None: None,
}
LEGACY = ("legacy_c", "legacy_threshold", "legacy_mean_field", "legacy_local")


@dataclass(frozen=True)
class Seng(Messages, Directions, of=natgrad.SENG):
    """SENG: natural gradient in the space of samples. With length=plain lr / damping is SGD's learning rate."""

    damping: float = argument()
    refresh: int = argument()
    refresh_share: float | None = argument(Budget, "share", default=None, note="None: no limit.")
    samples: int | None = argument()
    sketch: Literal["count", "uniform"] | None = argument(choices=SKETCHES)
    sketch_size: int | None = argument(natgrad.curvature.Sketch, "size")
    rank: int | None = argument()
    columns: Literal["empirical", "improved"] = argument()
    block: Literal["layer", "network"] = argument()
    budget: int = argument()
    legacy: bool = False
    """Scale sampled curvature as the release does, whose hyper-parameters were tuned with it."""
    legacy_c: int = argument(natgrad.curvature.Legacy, "c")
    legacy_threshold: int = argument(natgrad.curvature.Legacy, "threshold")
    legacy_mean_field: bool = argument(natgrad.curvature.Legacy, "mean_field")
    legacy_local: bool = argument(natgrad.curvature.Legacy, "local")
    replicated: bool = False
    """Keep all columns on every rank instead of each layer's at its owner: memory and work are not divided."""
    sampling_seed: int = argument(name="seed")

    left_out: ClassVar[Reasons] = {
        "Budget.then": "it is `refresh`",
        "gather": "owners send weights, as in SP-NGD",
        "graph": "recorded steps are tested for SP-NGD and K-FAC",
    }

    @property
    def cuttable(self) -> bool:
        return True

    def arguments(self, world: World) -> dict[str, Any]:
        self.fit()
        given = super().arguments(world)
        return {
            **given,
            "refresh": limited(self.refresh, self.refresh_share),
            "sketch": given["sketch"] and given["sketch"](**self.given(natgrad.curvature.Sketch)),
            "legacy": natgrad.curvature.Legacy(**self.given(natgrad.curvature.Legacy)) if self.legacy else None,
        }

    def ranks(self, world: World) -> World:
        """The same ranks, with these settings' messages and owners."""
        return World(world.transport, owners=not self.replicated, check=world.check, **self.given(World))

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
        if not self.legacy and (name := self.changed(*LEGACY)):
            raise ValueError(f"{name}={getattr(self, name)} says nothing to legacy=False; set --optimizer.legacy")
        if self.legacy_local and not self.replicated:
            raise ValueError("legacy_local takes each rank's own directions; set --optimizer.replicated")
        if self.legacy_local and self.block == "network":
            raise ValueError("legacy_local averages directions of layers; set --optimizer.block layer")
        if self.replicated and self.weights_wire is not None:
            raise ValueError(f"weights_wire={self.weights_wire}: replicated ranks send no weights; leave one out")
