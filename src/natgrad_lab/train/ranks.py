"""What ranks settle among each other beside the training: one run a folder, one error for all, everybody's words."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO, TypeVar

import torch
from torch import Tensor

from natgrad.parallel import OwnedTensor, World
from natgrad_lab.train.disk import refusal
from natgrad_lab.train.log import LOCK

try:
    import fcntl
except ImportError:  # Windows: nothing holds a folder there
    fcntl = None

T = TypeVar("T")
MOST = 2000
"""Bytes of what a rank says."""


class Lock:
    """Holds a folder until this process ends, or `release`: one run may write there. A killed run holds nothing."""

    def __init__(self, folder: Path) -> None:
        self.made = [one for one in (folder, *folder.parents) if not one.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self.file = _held(folder / LOCK)
        while not _is_there(self.file):  # whoever had it has taken it away in between
            self.file.close()
            folder.mkdir(parents=True, exist_ok=True)
            self.file = _held(folder / LOCK)
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.file.flush()

    def release(self) -> None:
        """Let others have the folder; where nothing was written, it goes as it came."""
        with contextlib.suppress(OSError):
            Path(self.file.name).unlink(missing_ok=True)
        self.file.close()
        with contextlib.suppress(OSError):  # not empty
            for folder in self.made:
                folder.rmdir()


def _held(path: Path) -> TextIO:
    """Open a file and lock it, where its file system has locks; ValueError where another process has."""
    file = path.open("a+")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        who = file.read().strip()
        raise ValueError(
            f"another run is writing to {str(path.parent)!r} ({who}); stop it, or name another --out"
        ) from None
    except OSError:
        pass  # a file system without locks
    return file


def _is_there(file: TextIO) -> bool:
    """Say whether a file still is what its name stands for."""
    try:
        return os.path.samestat(os.stat(file.name), os.fstat(file.fileno()))
    except OSError:
        return False


def on_first(world: World, work: Callable[[], T]) -> T | None:
    """Do `work` on rank 0; if it raises a ValueError, or cannot write, every rank raises a ValueError."""
    result, text = None, ""
    if world.rank == 0:
        try:
            result = work()
        except ValueError as error:
            text = str(error)
        except OSError as error:
            text = refusal(error)
    message = encoded(text)
    world.start([message])
    if told := decoded(message):
        raise ValueError(told)
    return result


def everybody(world: World, texts: Sequence[str]) -> list[str]:
    """Return what any rank says, each text once, in order; nothing much is sent where nobody has anything to say."""
    any_text = torch.tensor([float(len(texts) > 0)])
    world.max([any_text])
    if not any_text.item():
        return []
    pages = [encoded("\n".join(texts) if rank == world.rank else "") for rank in range(world.size)]
    world.gather([OwnedTensor(page, rank) for rank, page in enumerate(pages)])
    return sorted({line for page in pages for line in decoded(page).split("\n") if line})


def encoded(text: str) -> Tensor:
    """Return a text as bytes of a fixed length."""
    content = text.encode()[:MOST]
    message = torch.zeros(MOST, dtype=torch.uint8)
    message[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
    return message


def decoded(message: Tensor) -> str:
    """Return what was encoded."""
    return bytes(message.tolist()).rstrip(b"\0").decode(errors="ignore")
