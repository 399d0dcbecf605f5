"""What torch's GradScaler leaves on an optimizer: by what gradients were multiplied, and when."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from natgrad.readings import Readings


class LossScale:
    """The scale of this step's loss, as a GradScaler has left it; known after the step's first read.

    now: by this the gradients are still to be divided.
    seen: the factor on the gradients that hooks saw, and on those sent early: they came before any unscaling.
    """

    now = seen = 1.0

    def __init__(
        self, scale: Tensor | None, found: Tensor | None, scaler: Any, watched: bool, sent: bool, readings: Readings
    ):
        """Take what a GradScaler has left.

        Args:
            scale: `grad_scale` of the optimizer, None where gradients are unscaled or nobody scales.
            found: `found_inf` of the optimizer, not 0 where GradScaler found infinite gradients.
            scaler: the GradScaler, if the user has handed it over.
            watched: hooks saw the passes.
            sent: gradients have left this rank before the step.
            readings: by which the scale reaches the host.

        """
        self.found, self._known = found, scaler is not None
        if self._known:
            self.seen = known_scale(scaler)
        if not self._known and found is not None and (sent or (scale is None and watched)):
            raise ValueError(
                f"the gradients were {'sent to other ranks' if sent else 'unscaled'} before step(), when the scale of "
                "the loss was not known: build the optimizer with scaler=, the GradScaler"
            )
        if scale is not None:
            readings.ask(scale, self._hear)

    def _hear(self, scale: Tensor) -> None:
        self.now = float(scale)
        if not self._known:
            self.seen = self.now


def known_scale(scaler: Any) -> float:
    """The factor on the loss right now. On ranks with gradients of their own it may differ from rank to rank."""
    return 1.0 if scaler is None else float(scaler.get_scale())
