"""Ctrl-C and SIGTERM ask a run to end after its step; asked twice, it ends at once.

A rank that stopped in the middle of a step would leave the others waiting for its message, so the first
signal only raises a flag. The loop sends the flag along with the loss, and all ranks stop after the same
step.
"""

import signal
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """A flag that Ctrl-C raises, for the time of a `with` block; call it to ask."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        return self.asked

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
