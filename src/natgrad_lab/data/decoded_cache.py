"""Decoded pictures on the disk, so that only the first start of a data set decodes them.

What is kept is a file of pixels under NATGRAD_CACHE (else XDG_CACHE_HOME/natgrad, else ~/.cache/natgrad), by a digest
of what decides them: the set's fingerprint (of its files' names, sizes and times), which pictures, and their size. It
can be deleted at any time. NATGRAD_CACHE= (empty) keeps nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VERSION = 1  # of decoding.py: another one decodes anew
LEAST = 4096  # pictures that are worth a file


def folder() -> Path | None:
    """Return where decoded pictures are kept; None: nowhere."""
    told = os.environ.get("NATGRAD_CACHE")
    if told is not None:
        return Path(told).expanduser() if told else None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "natgrad"


def place_of(fingerprint: str, places: Tensor, size: int, resize: str) -> Path | None:
    """Return the file for these pictures of a set; None where they are not worth one, or nothing is kept."""
    where = folder()
    if where is None or len(places) < LEAST:
        return None
    told = f"{VERSION} {fingerprint} {size} {resize} ".encode() + places.numpy().tobytes()
    return where / f"{hashlib.sha256(told).hexdigest()[:32]}.npy"


def kept(path: Path | None, count: int, size: int) -> Tensor | None:
    """Return the pixels [n, 3, size, size] that were kept; None where there are none, or they cannot be read."""
    if path is None or not path.is_file():
        return None
    try:
        pixels = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = pixels.dtype == np.uint8 and pixels.shape == (count, 3, size, size)
    return torch.from_numpy(pixels) if fits else None


def keep(path: Path | None, pixels: Tensor) -> None:
    """Keep pixels in one go; a disk that is full or closed keeps nothing, and nobody is told."""
    if path is None:
        return
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as stream:
            np.save(stream, pixels.numpy(), allow_pickle=False)
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
