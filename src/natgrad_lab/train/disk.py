"""What is said of a file that cannot be written: which one it is, why, and the way out."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WAYS_OUT = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name a path in the system's errors that name none: only those of opening a file do by themselves."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def refusal(error: OSError) -> str:
    """What is said of an error of the system where a run cannot begin."""
    way = WAYS_OUT.get(error.errno or 0)
    out = "name another --out, or make room" if way is None else f"{way}, or name another --out"
    where = "a file of the run" if error.filename is None else repr(str(error.filename))
    return f"{where} cannot be written or read: {error.strerror}; {out}"


def reason_of(error: BaseException, path: Path) -> str:
    """Why a file, or one in a folder, could not be written: the system's reason, wherever among the causes it is."""
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno is not None:
            where = str(path) if cause.filename is None else str(cause.filename)
            why = os.strerror(cause.errno)
            return f"{where!r} cannot be written: {why}; {WAYS_OUT.get(cause.errno, 'see to the disk')}"
    return " ".join(str(error).split())[:200]


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what it came of, and what torch has packed into it."""
    while error is not None:
        yield error
        for packed in getattr(error, "failures", {}).values():
            yield from causes(packed[0])
        error = error.__cause__ or error.__context__
