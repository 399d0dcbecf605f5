"""Natural gradients in front of any torch optimizer: `.grad` becomes (F + lambda I)^-1 `.grad`, the weights stay.

    preconditioner = natgrad.Preconditioner(model, damping=1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ...
    loss.backward()
    preconditioner.step()
    optimizer.step()

Measuring, ranks, state and checkpoints are those of the optimizers (second_order.py). What is missing is what the torch
optimizer does: momentum, weight decay, a learning rate. Parameters without curvature keep their gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from natgrad.deprecated import renamed_arguments
from natgrad.layers import Layer
from natgrad.optim.arguments import SharedByPreconditioners
from natgrad.optim.blocks import Blocks, kfac_blocks
from natgrad.optim.fallback import plain_gradient
from natgrad.optim.kl_clip import KLClip
from natgrad.optim.second_order import SecondOrder
from natgrad.optim.segments import Segment
from natgrad.optim.step_size import Natural, plain
from natgrad.parallel import World
from natgrad.refresh import Adaptive, Staleness

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class NaturalGradient:
    """The rule of one natural gradient, which nothing is kept of."""

    leaves_weights: ClassVar[bool] = True

    def allocate(self, layer: Layer, state: dict[str, Any]) -> None:
        """Keep nothing."""

    def __call__(self, segments: Sequence[Segment], natural: Natural, world: World) -> None:
        for segment, direction in zip(segments, natural(segments, [s.gradient for s in segments])):
            segment.direction = direction


class Preconditioner(SecondOrder, shared=SharedByPreconditioners):
    """Replaces `.grad` by the natural gradient, for a torch optimizer that makes the step.

    Call `step()` after the last backward pass of a step and before whatever else looks at gradients: clipping by norm,
    the optimizer. Gradients may come from DistributedDataParallel, which has averaged them, or from a plain model on
    several ranks: then `step()` averages them, and every rank has the same natural gradient after it.

    With a GradScaler pass `scaler=` and call `scaler.unscale_(optimizer)` before, as for clipping. Gradients that are
    not finite stay as they are, and `scaler.step(optimizer)` skips the step. `state_dict()` is the curvature, beside
    the optimizer's own.

    Args:
        model: the network itself, plain or wrapped.
        damping: lambda > 0 of F + lambda I, in units of squared per-sample gradients.
        refresh, rows_per_dim, ema_decay, fisher, curvature: as for KFAC. `curvature=spngd_blocks` has blocks for
            normalisations.
        clip: KLClip(limit) shortens the natural gradient of all layers together such that the step changes the output
            by at most `limit` (lr^2 d^T F d); None leaves its length.
        lr: the learning rate of the optimizer, which `clip` asks for: a number, or a function that gives the present
            one, such as `lambda: optimizer.param_groups[0]["lr"]`.
        **shared: see natgrad.optim.arguments.SharedByPreconditioners.

    Raises:
        ValueError: names the value that cannot be and the way out.

    """

    elsewhere = dict.fromkeys(
        ("momentum", "weight_decay", "rule", "length", "fallback", "rescale", "max_norm", "gather", "graph"),
        "the optimizer that makes the step decides it",
    )

    @renamed_arguments(samples="rows_per_dim", decay="ema_decay")
    def __init__(
        self,
        model: nn.Module,
        *,
        damping: float = 3e-4,
        refresh: int | Staleness = Adaptive(),  # noqa: B008  (frozen)
        rows_per_dim: int | None = 8,
        ema_decay: float = 0.5,
        fisher: Literal["empirical", "sampled"] = "empirical",
        curvature: Blocks = kfac_blocks,
        clip: KLClip | None = None,
        lr: float | Callable[[], float] | None = None,
        **shared: Unpack[SharedByPreconditioners],
    ):
        if clip is not None and not isinstance(clip, KLClip):
            raise ValueError(f"clip={clip!r}: give natgrad.KLClip(limit), or None for natural gradients as they are")
        if (clip is None) != (lr is None):
            raise ValueError(
                "clip= asks how far the optimizer goes: give lr= too, a number or a function of nothing"
                if lr is None
                else f"lr={lr!r} is for clip= alone: the optimizer that makes the step has the learning rate"
            )
        self._rate, self._clips = lr if callable(lr) else None, clip is not None
        super().__init__(
            model,
            1.0 if lr is None else lr() if callable(lr) else lr,
            momentum=0.0,
            weight_decay=0.0,
            damping=damping,
            refresh=refresh,
            rows_per_dim=rows_per_dim,
            ema_decay=ema_decay,
            fisher=fisher,
            curvature=curvature,
            rule=NaturalGradient(),
            length=plain if clip is None else clip,
            gather="directions",
            fallback=plain_gradient,
            **shared,
        )

    def _stages(self, away: bool) -> None:
        if hasattr(self, "found_inf"):
            raise ValueError(
                "scaler.step(preconditioner): gradients would be unscaled twice; call preconditioner.step() after "
                "scaler.unscale_(optimizer), and scaler.step(optimizer)"
            )
        if self._clips and self.scaler is not None and not unscaled(self.scaler):
            raise ValueError(
                "clip= measures gradients, which are scaled: call scaler.unscale_(optimizer) before step()"
            )
        if self._rate is not None:
            for group in self.param_groups:
                group["lr"] = float(self._rate())
        if self.world.size > 1:  # also what is not preconditioned is to be the same on all ranks
            self.average_gradients()
        super()._stages(away)

    def join_hook(self, **_: Any) -> Any:
        """Refuse torch's Join."""
        raise ValueError("Join: a Preconditioner takes the mean over all ranks; give each rank as many batches")


def unscaled(scaler: Any) -> bool:
    """Whether a GradScaler has unscaled the gradients of an optimizer since its last update, or scales nothing."""
    states = getattr(scaler, "_per_optimizer_states", {})
    return not scaler.is_enabled() or any(state["stage"].name == "UNSCALED" for state in states.values())
