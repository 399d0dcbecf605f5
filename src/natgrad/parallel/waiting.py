"""Who is waited for: a message that a rank does not take part in ends with an error that names the rank.

A backend says of a message that has failed how long it has waited, or that a connection is gone, and not whose. So a
rank whose message has failed signs its name in the store that all ranks have met at. Those that are waiting too sign
soon after, since they wait for the same message; who has not signed within some seconds is who was waited for.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

GRACE = 5.0
"""Seconds in which the other ranks sign that their messages have failed too; they wait for the same one."""
SIGNS = re.compile(
    r"[Tt]imed out|[Tt]imeout|[Cc]onnection (reset|closed|refused)|Broken pipe|remote process exited|"
    r"[Nn]o route to host|Network is unreachable|Socket|closed by peer|failed to (recv|send)"
)
"""What backends say of a message that a rank has not taken part in."""


class LostRanksError(RuntimeError):
    """A message in which some rank has not taken part. The text names the ranks and what to do.

    missing: the ranks that were waited for, by their numbers in the default process group; empty where they are not
    known. first: whether this rank is the first of those that were left waiting, so that one speaks for all.
    """

    def __init__(self, text: str, missing: Sequence[int], first: bool):
        super().__init__(text)
        self.missing, self.first = tuple(missing), first


@contextmanager
def waits_for(message: str, ranks: Sequence[int], rank: int) -> Iterator[None]:
    """Around a message between these ranks, of which this is `rank`.

    Raises:
        LostRanksError: for an error of the backend that comes of a rank that did not take part.

    """
    began = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LostRanksError) or not SIGNS.search(str(error)):
            raise
        raise lost(message, ranks, rank, time.monotonic() - began, str(error)) from error


def lost(message: str, ranks: Sequence[int], rank: int, seconds: float, why: str) -> LostRanksError:
    """The error of a rank whose message has failed after so many seconds."""
    present = sign(ranks, rank)
    late = "imed out" in why or "imeout" in why
    if present is None:
        # torchrun's launcher keeps the store, or else the process of rank 0
        apart = rank == 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        missing = [] if apart else [0]
        who = "another rank, and the store in which ranks meet does not answer" if apart else "rank 0"
    else:
        missing = [r for r in ranks if r not in present]
        who = named(missing) if missing else "the others, who had stopped waiting for this one,"
    told = f"waited {seconds:.0f} s for {who} in {message}" if late else f"lost the connection to {who} in {message}"
    way = (
        "start all ranks again from the last checkpoint; a longer wait is natgrad train --timeout, "
        "World(timeout=) or init_process_group(timeout=)"
        if late
        else "start all ranks again from the last checkpoint"
    )
    first = present is None or rank == min(present)
    return LostRanksError(f"rank {rank} has {told}: {way}", missing, first)


def named(ranks: Sequence[int]) -> str:
    """Ranks in words."""
    some = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {some}"


def sign(ranks: Sequence[int], rank: int) -> set[int] | None:
    """Sign that this rank's message has failed, and wait for who else does. Returns the ranks that have signed; None
    where the store cannot be reached. Over a link that is cut, the store does not answer for a quarter of an hour.
    """
    found: list[set[int]] = []

    def look() -> None:
        with suppress(RuntimeError, ValueError):
            store: Any = dist.distributed_c10d._get_default_store()
            store.set(_key(rank), "1")
            found.append(signed(store, [_key(r) for r in ranks], ranks, GRACE))

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(2 * GRACE)
    return found[0] if found else None


def signed(store: Any, keys: Sequence[str], ranks: Sequence[int], seconds: float) -> set[int]:
    """The ranks whose keys are in a store before so many seconds have passed."""
    deadline, left = time.monotonic() + seconds, dict(zip(ranks, keys))
    while left:
        left = {r: key for r, key in left.items() if not store.check([key])}
        if left and time.monotonic() > deadline:
            break
        if left:
            time.sleep(0.05)
    return set(ranks) - left.keys()


def _key(rank: int) -> str:
    return f"natgrad/stopped-waiting/{rank}"


def call_roll(store: Any, rank: int, size: int, timeout: float) -> None:
    """Wait until all ranks have come.

    Raises:
        LostRanksError: names those that have not come within `timeout` seconds.

    """
    keys = [f"natgrad/here/{r}" for r in range(size)]
    store.set(keys[rank], "1")
    try:
        store.wait(keys, timedelta(seconds=timeout))
    except RuntimeError:
        here = signed(store, keys, range(size), 0.0)
        missing = [r for r in range(size) if r not in here]
        if missing:
            raise LostRanksError(
                f"{named(missing)} of {size} did not come within {timeout:g} s: start all of them, or wait longer "
                "(natgrad train --timeout)",
                missing,
                rank == min(here),
            ) from None
