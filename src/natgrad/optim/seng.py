"""SENG: sketchy empirical natural gradient (Yang et al. 2022, arXiv 2006.05924), exact where it can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from natgrad.curvature import CountSketch, Curvature, Identity, Legacy, SampleSpace, Sketch
from natgrad.hooks import LogitGradientScaling
from natgrad.layers import Layer, UncurvedParameter
from natgrad.optim import validation
from natgrad.optim.arguments import SharedByNaturalGradients
from natgrad.optim.directions import Momentum, Rule
from natgrad.optim.kl_clip import measured_change
from natgrad.optim.network import Network
from natgrad.optim.second_order import SecondOrder
from natgrad.optim.segments import Segment
from natgrad.optim.step_size import Remembers, StepSize, layerwise
from natgrad.parallel import World
from natgrad.refresh import Budget, Every, Staleness

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class SampleBlocks:
    """Per-sample curvature for every layer that is known, none for the rest."""

    space: SampleSpace

    def __call__(self, layer: Layer, rows_per_dim: int | None, max_size: int) -> Curvature:
        return Identity() if isinstance(layer, UncurvedParameter) else self.space


class SENG(SecondOrder, shared=SharedByNaturalGradients):
    """Directions (lambda I + U U^T)^-1 g with the gradients of single samples as U's columns.

    The length is SP-NGD's (`measured_change`), so lr means the same. The authors' steps have length=plain, damping near
    1 and momentum 0.9: they are SGD's with lr / damping for its learning rate. In training mode the gradients of single
    samples hold the batch statistics of normalisations fixed.

    Args:
        model, lr, momentum, weight_decay, length, rule: as for SPNGD.
        damping: added to the curvature: lambda, absolute. A new value acts at once.
        refresh: steps between measurements, or Budget(share, then=steps) with block="layer".
        samples: samples of a step whose gradients are the columns of U, drawn over all ranks; None takes all.
        sketch: map to fewer numbers by which columns of many weights are multiplied: CountSketch(), Uniform();
            None: exact products.
        rank: places to which factors are cut for these products; None: all. 4 of 16 give errors of .04 to .2 in K.
        columns: "empirical": gradients as they are; "improved": over the norm of the gradient of the sample's logits
            (arXiv 2406.06420).
        block: "layer": one solve for each layer; "network": one solve for all layers.
        budget: bytes of one layer's columns at its owner; a layer that would need more gets fewer samples.
        legacy: a Legacy for the release's own ways.
        **shared: see natgrad.optim.arguments.SharedByNaturalGradients. World(owners=False) keeps all columns on every
            rank.

    Raises:
        ValueError: names the value that cannot be and the way out.

    """

    elsewhere = dict.fromkeys(
        ("curvature", "ema_decay", "rows_per_dim", "fisher", "max_size"),
        "its curvature is that of this step's own samples",
    )

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        momentum: float = 0.7,
        damping: float = 0.01,
        weight_decay: float = 0.0,
        refresh: int | Staleness = 4,
        samples: int | None = 256,
        sketch: Sketch | None = CountSketch(),  # noqa: B008  (frozen)
        rank: int | None = None,
        columns: Literal["empirical", "improved"] = "empirical",
        block: Literal["layer", "network"] = "layer",
        budget: int = 2**30,
        legacy: Legacy | None = None,
        length: StepSize | Remembers = measured_change,
        rule: Rule = Momentum(before=False),  # noqa: B008
        **shared: Unpack[SharedByNaturalGradients],
    ):
        validation.one_of("columns", columns, ("empirical", "improved"))
        validation.one_of("block", block, ("layer", "network"))
        validation.whole("samples", samples, 1, none=True)
        validation.whole("rank", rank, 1, none=True)
        validation.whole("budget", budget, 1)
        when = refresh.rule if isinstance(refresh, Budget) else refresh
        if not isinstance(when, Every) and isinstance(when, Staleness):
            raise ValueError(f"refresh={refresh}: columns of other samples cannot be compared; give a number of steps")
        if isinstance(refresh, Budget) and block == "network":
            raise ValueError(
                f'refresh={refresh}: block="network" needs all layers\' columns of one step; take block="layer"'
            )
        world = shared.get("world")
        shared["world"] = world = world if isinstance(world, World) else World(world)
        if legacy is not None and legacy.local and world.size > 1 and world.owners:
            raise ValueError("Legacy(local=True): every rank takes its own directions; give world=World(owners=False)")
        if legacy is not None and legacy.local and block == "network":
            raise ValueError('Legacy(local=True) is by layers: leave block="network" out')
        space = SampleSpace(samples, sketch, rank, columns, budget, legacy, block)
        super().__init__(
            model,
            lr,
            momentum=momentum,
            damping=damping,
            weight_decay=weight_decay,
            refresh=refresh,
            curvature=SampleBlocks(space),
            length=length,
            rule=rule,
            **shared,
        )
        if columns == "improved":
            self.engine.capture.disarm()
            self.engine.judged = LogitGradientScaling()
            self.engine.replace(self.cells)
            self.engine.arm(1)
        if block == "network":
            self.method.natural = Network(self.world, lambda: self.cells, self.group_of)
        elif legacy is not None and legacy.local:
            self.engine.local = True
            self.method.natural = self._averaged

    def _averaged(self, segments: Sequence[Segment], gradients: Sequence[Tensor]) -> list[Tensor]:
        """The mean over ranks of directions by their own samples."""
        directions = layerwise(segments, gradients)
        self.world.mean(directions, "directions")
        return directions
