"""SP-NGD and K-FAC: every choice that natgrad.SPNGD and natgrad.KFAC offer, by name."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import natgrad
from natgrad.optim import LayerBlocks
from natgrad.parallel import World
from natgrad.refresh import Adaptive, Staleness
from natgrad_lab.train.optimizers.composed import Directions, Measurements, Messages, limited
from natgrad_lab.train.optimizers.derived import Reasons, argument


@dataclass(frozen=True)
class Curved(Messages, Directions, Measurements):
    """What SP-NGD and K-FAC have in common."""

    refresh: int | None = None
    """Measure every so many steps; None: each statistic when it has changed by more than `tolerance`."""
    tolerance: float = argument(Adaptive, note="`at` is widen-below.")
    widen_below: int = argument(Adaptive, "at")
    limit: int | None = argument(Adaptive)
    norm_damping: float = argument(natgrad.curvature.UnitWise, "coefficient", note="Of normalisations.")
    graph: bool = argument()

    left_out: ClassVar[Reasons] = {"UnitWise.rows_per_dim": "it is `rows_per_dim`"}

    @property
    def cuttable(self) -> bool:
        return True

    def arguments(self, world: World) -> dict[str, Any]:
        return {
            **super().arguments(world),
            "refresh": limited(self.due(), self.refresh_share),
            "curvature": self.blocks(),
        }

    def due(self) -> int | Staleness:
        """When statistics are due; numbers of the adaptive rule beside a fixed interval are refused."""
        if self.refresh is None:
            return Adaptive(**self.given(Adaptive))
        if name := self.changed("tolerance", "widen_below", "limit"):
            raise ValueError(
                f"{name}={getattr(self, name)} belongs to the adaptive rule, but refresh={self.refresh} is fixed; "
                "set --optimizer.refresh None"
            )
        return self.refresh

    def blocks(self) -> LayerBlocks:
        """The curvature of every kind of layer."""
        blocks = LayerBlocks(**self.given(LayerBlocks))
        if self.norms == "plain":
            if self.norm_damping != 1:
                raise ValueError(
                    f"norm_damping={self.norm_damping:g} says nothing to norms=plain; set --optimizer.norms unitwise"
                )
            return blocks
        if not self.norm_damping > 0:
            raise ValueError(f"norm_damping={self.norm_damping:g} must be positive; set --optimizer.norm-damping")
        return LayerBlocks(blocks.matrix, partial(blocks.norm, **self.given(natgrad.curvature.UnitWise)))


@dataclass(frozen=True)
class SpNgd(Curved, of=natgrad.SPNGD):
    """SP-NGD: natural gradient with Kronecker factors, refreshed when they have changed."""

    left_out: ClassVar[Reasons] = {"gather": "owners send weights, as in the paper"}


@dataclass(frozen=True)
class KFac(Curved, of=natgrad.KFAC):
    """K-FAC: Kronecker factors averaged over measurements."""

    gather: Literal["weights", "directions"] = argument()
