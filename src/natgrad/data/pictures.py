"""Pictures that stay in their files and are decoded when a batch asks for them: ImageNet at 256x256 is 252 GB raw."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


class Pictures:
    """n files as if they were a tensor [n, 3, size, size] of uint8: an index reads them, on all cores."""

    def __init__(self, files: Sequence[Path], size: int, device: torch.device | None = None) -> None:
        self.files, self.size, self.device = files, size, device or torch.device("cpu")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Tensor) -> Tensor:
        return read([self.files[place] for place in index.tolist()], self.size).to(self.device)

    def to(self, device: torch.device) -> Pictures:
        """The same pictures, handed out on another device."""
        return Pictures(self.files, self.size, device)

    def take(self, index: Tensor) -> Pictures:
        """The pictures at these places."""
        return Pictures([self.files[place] for place in index.tolist()], self.size, self.device)


def read(files: Sequence[Path], size: int) -> Tensor:
    """Decode files to uint8 [n, 3, size, size]; PIL lets other threads run while it decodes."""
    pixels = np.empty((len(files), 3, size, size), dtype=np.uint8)

    def place(number: int) -> None:
        pixels[number] = picture(files[number], size)

    with ThreadPoolExecutor(threads()) as pool:
        list(pool.map(place, range(len(files))))
    return torch.from_numpy(pixels)


def threads() -> int:
    """How many of the machine's cores are this rank's part."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def picture(file: Path, size: int) -> np.ndarray:
    """Return a file as uint8 [3, size, size], whatever its shape was."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            small = opened.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{str(file)!r} is no readable image ({error}); remove it") from None
    return np.asarray(small, dtype=np.uint8).transpose(2, 0, 1)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the same items, the next one being made in a thread while the last one is in use."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]
