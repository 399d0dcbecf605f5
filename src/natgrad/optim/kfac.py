"""K-FAC: Kronecker-factored approximate curvature (Martens and Grosse 2015; distributed: arXiv 1811.12019)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import nn

from natgrad.deprecated import renamed_arguments
from natgrad.optim.arguments import SharedByFactors
from natgrad.optim.blocks import Blocks, kfac_blocks
from natgrad.optim.directions import Momentum, Rule
from natgrad.optim.kl_clip import measured_change
from natgrad.optim.second_order import SecondOrder
from natgrad.optim.step_size import Remembers, StepSize
from natgrad.refresh import Adaptive, Staleness

if TYPE_CHECKING:
    from typing_extensions import Unpack


class KFAC(SecondOrder, shared=SharedByFactors):
    """Natural gradients with Kronecker factors that are averaged over measurements.

    Papers measure every k steps with a decay of 0.95: `refresh=10, ema_decay=0.95`. In runs of some hundred steps that
    remembers networks long gone, so by default a statistic is measured when it has changed, and half of the old
    average is kept (docs/settings.md).
    Normalisations take the plain gradient; pass `curvature=spngd_blocks` for unit-wise blocks. `gather` says what
    owners send to everyone: new weights, or "directions" for every rank to apply, as in the paper of 2019.

    Args:
        model, lr, momentum, damping, weight_decay, refresh, rows_per_dim, ema_decay, fisher, curvature, length, rule:
            as for SPNGD.
        **shared: see natgrad.optim.arguments.SharedByFactors.

    Raises:
        ValueError: names the value that cannot be and the way out.

    """

    @renamed_arguments(samples="rows_per_dim", decay="ema_decay")
    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        momentum: float = 0.7,
        damping: float = 3e-4,
        weight_decay: float = 0.0,
        refresh: int | Staleness = Adaptive(),  # noqa: B008  (frozen)
        rows_per_dim: int | None = 8,
        ema_decay: float = 0.5,
        fisher: Literal["empirical", "sampled"] = "empirical",
        curvature: Blocks = kfac_blocks,
        length: StepSize | Remembers = measured_change,
        rule: Rule = Momentum(before=False),  # noqa: B008
        **shared: Unpack[SharedByFactors],
    ):
        super().__init__(
            model,
            lr,
            momentum=momentum,
            damping=damping,
            weight_decay=weight_decay,
            refresh=refresh,
            rows_per_dim=rows_per_dim,
            ema_decay=ema_decay,
            fisher=fisher,
            curvature=curvature,
            length=length,
            rule=rule,
            **shared,
        )
