"""SP-NGD: scalable and practical natural gradient descent (Osawa et al. 2020, arXiv 2002.06015)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import nn

from natgrad.deprecated import renamed_arguments
from natgrad.optim.arguments import SharedByFactors
from natgrad.optim.blocks import Blocks, spngd_blocks
from natgrad.optim.directions import Momentum, Rule
from natgrad.optim.kl_clip import measured_change
from natgrad.optim.second_order import SecondOrder
from natgrad.optim.step_size import Remembers, StepSize
from natgrad.refresh import Adaptive, Staleness

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SPNGD(SecondOrder, shared=SharedByFactors):
    """Natural gradients with Kronecker factors, unit-wise blocks for norms, and statistics measured when they move.

    Args:
        model: the network itself, on one rank or on several, plain or wrapped in DistributedDataParallel.
        lr: learning rate, above 0.
        momentum: share of the last direction that is repeated, in [0, 1).
        damping: added to the curvature before it is inverted, split between the two factors: lambda > 0 of
            F + lambda I, in units of squared per-sample gradients (paper section 3.3.3).
        weight_decay: strength of the decay. Weights lose lr * weight_decay of themselves in a step, as in AdamW;
            rule=Momentum(decoupled=False) adds the decay to the direction instead.
        refresh: a Staleness, or a whole number of steps between measurements; Budget(share, then=...) of either spreads
            the work over steps.
        rows_per_dim: rows measured for each dimension of a statistic, drawn over all samples and places; None measures
            all.
        ema_decay: share of the old average that a measurement keeps; 0: each measurement replaces the last (SP-NGD).
        fisher: labels of the curvature. "empirical": the data's; "sampled": drawn from the model's prediction (by
            `sample(output)` before `backward()`), at one more backward pass a measurement.
        curvature: a function of a layer that gives its curvature.
        length: how far a step goes along its direction: measured_change, kl_clip, trust, plain or a function of yours.
        rule: where a step goes: Momentum(before=..., coefficient=corrected | tied | heavy_ball) or a Rule of yours.
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
        ema_decay: float = 0.0,
        fisher: Literal["empirical", "sampled"] = "empirical",
        curvature: Blocks = spngd_blocks,
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
