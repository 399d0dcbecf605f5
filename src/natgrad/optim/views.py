"""What an optimizer tells of itself: coverage, intervals, traffic and times."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from natgrad.budget import Purse
from natgrad.curvature_engine import Assumed, CurvatureEngine
from natgrad.layer_state import LayerState
from natgrad.optim.coverage import CoverageTable, Preconditioned, coverage
from natgrad.optim.directions import Rule, directions_kept
from natgrad.optim.fallback import Fallback, Recalls
from natgrad.optim.step_size import Keeps, Remembers, StepSize
from natgrad.parallel import World


class Views:
    """Read-only views on a running optimizer."""

    engine: CurvatureEngine
    world: World
    fallback: Fallback
    length: StepSize | Remembers
    rule: Rule
    whys: list[str]
    purse: Purse | None  # what a step may spend on measuring and factoring
    probe: Callable[[dict[nn.Parameter, Tensor]], None] | None = None  # makes directions as long as they should be
    skipped: int  # steps given up because a gradient was not finite

    @property
    def cells(self) -> list[LayerState]:
        """The layers in the model's order."""
        return self.engine.cells

    preconditioned = Preconditioned(0, 0, 0, 0)
    """How many layers and weights the last step preconditioned by their own curvature."""

    @property
    def assumed(self) -> Assumed | None:
        """What was assumed about the last step that measured: its samples, and the predictions of each. None before."""
        return self.engine.assumed

    def coverage(self) -> CoverageTable:
        """A row for every layer: its curvature, why, its size and cost. Printed, it is a table."""
        vectors, loose = 1 + isinstance(self.length, Keeps), 2  # the rule's, the length's; of the fallback
        if isinstance(self.length, Remembers) and self.length.looks_back:  # the last direction, if it is nowhere else
            vectors += directions_kept(self.rule) is None
            loose += not isinstance(self.fallback, Recalls)
        return coverage(self.cells, self.whys, self.fallback.name, vectors, loose)

    def intervals(self) -> dict[str, int]:
        """The present refresh interval of every statistic, by layer and statistic."""
        return {f"{c.name}.{m.key}": c.clock(m.key)[1] for c in self.cells for m in c.statistics}

    def traffic(self) -> dict[str, int]:
        """Bytes of payload in the last step by kind: gradients, statistics, weights, scalars."""
        return dict(self.world.sent)

    @property
    def refreshed(self) -> float:
        """The share of all statistics that was measured in the last step."""
        return self.engine.share

    @property
    def spent(self) -> float | None:
        """What measuring and factoring took in the last step as a share of its passes, counted in operations.

        First measurements do not count. None without a Budget.
        """
        return None if self.purse is None else self.purse.spent

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds on this rank's clock by stage, over all steps."""
        return self.engine.seconds
