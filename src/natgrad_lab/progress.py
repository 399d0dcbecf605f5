"""What is shown of work that takes more than a moment and is no training: a bar, or a line now and then in a file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from multiprocessing import parent_process
from typing import TextIO, TypeVar

T = TypeVar("T")

PATIENCE = 2.0
"""Seconds before anything is shown: most things are done by then."""
SELDOM = 15.0
"""Seconds between two lines in a file."""


def tracked(items: Iterable[T], total: int, title: str, stream: TextIO | None = None) -> Iterator[T]:
    """Yield the items, showing how many of `total` are done; on rank 0, and not in a worker process."""
    if os.environ.get("RANK", "0") != "0" or parent_process() is not None:
        yield from items
        return
    stream = sys.stderr if stream is None else stream
    if stream is None:  # a process without a terminal may have no streams
        yield from items
        return
    watched = stream.isatty() and os.environ.get("TERM") != "dumb"
    began = last = time.monotonic()
    shown = False
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - began > PATIENCE and now - last > (0.2 if watched else SELDOM if shown else PATIENCE):
            left = (now - began) / max(done, 1) * (total - done)
            text = f"{title}: {done / max(total, 1):.0%}, about {left:.0f} s left"
            stream.write(f"\r\x1b[2K{text}" if watched else f"{text}\n")
            stream.flush()
            last, shown = now, True
        yield item
    if shown:
        took = f"{title}: {time.monotonic() - began:.0f} s"
        stream.write(f"\r\x1b[2K{took}\n" if watched else f"{took}\n")
        stream.flush()
