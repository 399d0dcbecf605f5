"""One run writes to a folder at a time; who holds it is told, and a run that was killed holds nothing."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from natgrad.parallel import World
from natgrad.train.log import LOCK

T = TypeVar("T")
MOST = 1000
"""Bytes of a message that ranks pass on."""


class Lock:
    """Holds a folder until this process ends, or `release`."""

    def __init__(self, folder: Path) -> None:
        self.made = [one for one in (folder, *folder.parents) if not one.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / LOCK).open("a+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            who = self.file.read().strip()
            raise ValueError(
                f"another run is writing to {str(folder)!r} ({who}); stop it, or name another --out"
            ) from None
        except OSError:
            return  # a file system without locks
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.file.flush()

    def release(self) -> None:
        """Let others have the folder; where nothing was written, it goes as it came."""
        Path(self.file.name).unlink(missing_ok=True)
        self.file.close()
        with contextlib.suppress(OSError):  # not empty
            for folder in self.made:
                folder.rmdir()


def on_first(world: World, work: Callable[[], T]) -> T | None:
    """Do `work` on rank 0; if it raises a ValueError, every rank does."""
    result, text = None, b""
    if world.rank == 0:
        try:
            result = work()
        except ValueError as error:
            text = str(error).encode()[:MOST]
    message = torch.zeros(MOST, dtype=torch.uint8)
    message[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    world.start([message])
    told = bytes(message.tolist()).rstrip(b"\0").decode(errors="ignore")
    if told:
        raise ValueError(told)
    return result
