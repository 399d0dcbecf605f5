"""What torch's GradScaler leaves on an optimizer, read: by what gradients were multiplied, and when."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from natgrad.optim.base import SecondOrder


def loss_scale(optimizer: SecondOrder) -> tuple[float, bool]:
    """By what the gradients are still to be divided, and whether GradScaler found them infinite."""
    scale, found = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    return (1.0 if scale is None else float(scale)), (found is not None and bool(found))


def hook_scale(optimizer: SecondOrder, scale: float) -> float:
    """The factor on the gradients that hooks saw, and on those sent early: they came before any unscaling."""
    if optimizer.scaler is not None:
        return known_scale(optimizer)
    scaled = hasattr(optimizer, "found_inf")
    unscaled = scaled and getattr(optimizer, "grad_scale", None) is None
    sent = optimizer.gradients.sent_local
    if (unscaled and optimizer.engine.capture.armed) or (scaled and sent):
        raise ValueError(
            f"the gradients were {'sent to other ranks' if sent else 'unscaled'} before step(), when the scale of the "
            "loss was not known: build the optimizer with scaler=, the GradScaler"
        )
    return scale


def known_scale(optimizer: SecondOrder) -> float:
    """The factor on the loss right now. On ranks with gradients of their own it may differ from rank to rank."""
    return 1.0 if optimizer.scaler is None else float(optimizer.scaler.get_scale())
