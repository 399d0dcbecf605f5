"""What torch's GradScaler leaves on an optimizer: by what gradients were multiplied, and when."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from natgrad.optim.base import SecondOrder


class LossScale:
    """The scale of this step's loss, as a GradScaler has left it on the optimizer; known after the step's first read.

    now: by this the gradients are still to be divided.
    seen: the factor on the gradients that hooks saw, and on those sent early: they came before any unscaling.
    """

    now = seen = 1.0

    def __init__(self, optimizer: SecondOrder):
        self.found: Tensor | None = getattr(optimizer, "found_inf", None)
        """Not 0 where GradScaler found infinite gradients."""
        scale, self._known = getattr(optimizer, "grad_scale", None), optimizer.scaler is not None
        if self._known:
            self.seen = known_scale(optimizer)
        sent = optimizer.gradients.sent_local
        unscaled = self.found is not None and scale is None and optimizer.engine.capture.armed
        if not self._known and (unscaled or (self.found is not None and sent)):
            raise ValueError(
                f"the gradients were {'sent to other ranks' if sent else 'unscaled'} before step(), when the scale of "
                "the loss was not known: build the optimizer with scaler=, the GradScaler"
            )
        if scale is not None:
            optimizer.readings.ask(scale, self._hear)

    def _hear(self, scale: Tensor) -> None:
        self.now = float(scale)
        if not self._known:
            self.seen = self.now


def known_scale(optimizer: SecondOrder) -> float:
    """The factor on the loss right now. On ranks with gradients of their own it may differ from rank to rank."""
    return 1.0 if optimizer.scaler is None else float(optimizer.scaler.get_scale())
