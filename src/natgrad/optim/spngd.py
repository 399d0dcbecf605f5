"""SP-NGD: scalable and practical natural gradient descent (Osawa et al. 2020, arXiv 2002.06015)."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from natgrad.optim.blocks import Blocks, spngd_blocks
from natgrad.optim.directions import Momentum, Rule
from natgrad.optim.kl_clip import measured_change
from natgrad.optim.rescale import Rescale
from natgrad.optim.second_order import SecondOrder
from natgrad.optim.step_size import Remembers, StepSize
from natgrad.refresh import Adaptive, Staleness


class SPNGD(SecondOrder):
    """Natural gradients with Kronecker factors, unit-wise blocks for norms, and statistics measured when they move.

    Args:
        model: the network itself, on one rank, on several, or wrapped in DistributedDataParallel.
        lr: learning rate, above 0.
        momentum: of `rule`, in [0, 1).
        damping: lambda > 0 of F + lambda I, in units of squared per-sample gradients (paper section 3.3.3).
        weight_decay: weights lose lr * weight_decay of themselves in a step, as in AdamW;
            rule=Momentum(decoupled=False) adds the decay to the direction instead.
        refresh: a Staleness, or a whole number of steps between measurements; Budget(share, then=...) of either spreads
            the work over steps.
        samples: rows measured per dimension of a factor, drawn over all samples and places; None measures all.
        decay: of a running mean over measurements; 0 replaces, as the paper does.
        fisher: "empirical" takes the data's labels, in the same backward pass; "sampled" draws them from the model's
            prediction: call `sample(output)` before `backward()`.
        curvature: a function of a layer that gives its curvature.
        length: how far a step goes: measured_change, kl_clip, trust, plain or a function of yours.
        rule: where it goes: Momentum(before=..., coefficient=corrected | tied | heavy_ball) or a Rule of yours.
        rescale: "always" (the paper, eq. 24) or "shrink" (its release) holds weights at their He norm.
        **shared: params (parameters, named parameters or torch's groups; a group may set lr, momentum, weight_decay,
            damping, refresh), reduction of the loss ("mean" or "sum"; None is a mean), predictions (how many
            predictions of a sample a mean loss averages: one class of an image, all places of a text; None counts the
            rows of logits that have a gradient), batch_dim (where samples are in inputs of several dimensions, for all
            modules or by name; None: first, or as `batch_first` of the modules around says), max_norm, scaler (a
            GradScaler, if you unscale yourself, call reduce() or overlap), fallback (direction of parameters without
            curvature), max_size (sides above it stay diagonal), strict (refuse such parameters), seed, world, graph (on
            GPUs, the launches of a step in which nothing is measured are recorded once and made again as CUDA graphs;
            one gradient more stays in memory).

    Raises:
        ValueError: names the value that cannot be and the way out.

    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        momentum: float = 0.7,
        damping: float = 3e-4,
        weight_decay: float = 0.0,
        refresh: int | Staleness = Adaptive(),  # noqa: B008  (frozen)
        samples: int | None = 8,
        decay: float = 0.0,
        fisher: Literal["empirical", "sampled"] = "empirical",
        curvature: Blocks = spngd_blocks,
        length: StepSize | Remembers = measured_change,
        rule: Rule = Momentum(before=False),  # noqa: B008
        rescale: Rescale | None = None,
        **shared: Any,
    ):
        super().__init__(
            model,
            lr,
            momentum=momentum,
            damping=damping,
            weight_decay=weight_decay,
            refresh=refresh,
            samples=samples,
            decay=decay,
            fisher=fisher,
            curvature=curvature,
            length=length,
            rule=rule,
            rescale=rescale,
            **shared,
        )
