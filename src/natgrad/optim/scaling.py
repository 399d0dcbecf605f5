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
        return float(optimizer.scaler.get_scale())
    unscaled = hasattr(optimizer, "found_inf") and getattr(optimizer, "grad_scale", None) is None
    if unscaled and (optimizer.engine.capture.armed or optimizer.gradients.overlap is not None):
        raise ValueError(
            "the gradients were unscaled before step(), so the scale of what was measured or sent is not known: "
            "build the optimizer with scaler=, the GradScaler"
        )
    return scale
