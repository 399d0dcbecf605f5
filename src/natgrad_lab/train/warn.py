"""Warnings as a user wants them: each once, as one line, by one rank.

All ranks run the same program and warn of the same things, so rank 0 speaks for them. The line goes to stderr, which
a display that is open shows above its panel. NATGRAD_DEBUG leaves warnings as Python shows them, on every rank.
"""

import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakSet


class Listener(Protocol):
    """Is told the text of each warning on rank 0."""

    def warned(self, text: str) -> None: ...


listeners: WeakSet[Listener] = WeakSet()
"""A run's journal, which writes warnings down; who is gone listens no more."""


@contextmanager
def told_once(rank: int) -> Iterator[None]:
    """Show warnings in one line each, on rank 0 alone, for the time of a `with` block."""
    if "NATGRAD_DEBUG" in os.environ:
        yield
        return
    told: set[str] = set()

    def tell(message: Warning | str, *_: Any, **__: Any) -> None:
        text = clean(str(message))
        if rank == 0 and text not in told:
            told.add(text)
            print(f"warning: {text}", file=sys.stderr, flush=True)
            for listener in list(listeners):
                listener.warned(text)

    with warnings.catch_warnings():
        warnings.showwarning = tell
        yield


def clean(text: str) -> str:
    """Return a warning's text in one line, without the place in torch's source where it arose."""
    return re.sub(r"\s*\(Triggered internally at [^)]*\)", "", " ".join(text.split()))
