"""Texts: the next character of a window of characters, from texts that ship with python.

A window of `places` characters gives `places` samples of the loss, each to be predicted from those before it. Windows
do not overlap, so what is held out shares no character with what is learned from.
"""

import sysconfig
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from natgrad_lab.data.images import Source, Splits
from natgrad_lab.data.pictures import Bad

TEST = 10
"""Every tenth topic or file is for the test."""
LEFT_OUT = {"test", "tests", "idle_test", "idlelib", "pydoc_data", "site-packages", "dist-packages"}
"""Folders of the standard library that `Stdlib` leaves out: tests, an application, topics, other packages."""


@dataclass(frozen=True)
class Texts:
    """n windows of characters; the same interface as Images."""

    images: Tensor
    """[n, places + 1], uint8: characters as numbers."""
    classes: int
    bad: Bad = field(default_factory=Bad)
    """What could not be read: nothing of a text."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> Tensor:
        """[n], which window: a text has no classes to be held out in proportion, so every window is one."""
        return torch.arange(len(self.images), device=self.device)

    @property
    def device(self) -> torch.device:
        return self.images.device

    def to(self, device: torch.device) -> "Texts":
        return replace(self, images=self.images.to(device))

    def take(self, index: Tensor) -> "Texts":
        """Return the windows at these places as a data set of their own."""
        return replace(self, images=self.images[index.to(self.device)])

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return characters [n, places] and those that follow each of them [n, places], both int64."""
        windows = self.images[index.to(self.device)].long()
        return windows[:, :-1], windows[:, 1:]


@dataclass(frozen=True)
class Charlm(Source):
    """The help topics of python (pydoc_data.topics), character by character; characters that are rare are one."""

    places: int = 64
    """Characters in a window."""
    alphabet: int = 96
    """Characters that are told apart: the most frequent ones of the text, the last for all others."""

    def __post_init__(self) -> None:
        if self.places < 2:
            raise ValueError(f"places={self.places} leave nothing to predict from; set --data.places 64")
        if not 2 <= self.alphabet <= 256:
            raise ValueError(f"alphabet={self.alphabet} must be between 2 and 256; set --data.alphabet")

    def shape(self) -> tuple[int, int, int]:
        """(1, 1, places): a line of characters."""
        return (1, 1, self.places)

    def classes(self) -> int:
        return self.alphabet

    def text(self) -> tuple[str, str]:
        """Return the text to learn from and the text of the test."""
        return topics()

    def load(self) -> Splits:
        train, test = self.text()
        order = frequent(train, self.alphabet)
        made: list[Any] = [Texts(windows(text, order, self.places), self.alphabet) for text in (train, test)]
        return Splits(*made)


@dataclass(frozen=True)
class Stdlib(Charlm):
    """The source of python's standard library, some ten million characters; another version of python has another."""

    places: int = 128
    """Characters in a window."""
    alphabet: int = 128
    """Characters that are told apart: the most frequent ones of the text, the last for all others."""

    def text(self) -> tuple[str, str]:
        """Return the text to learn from and the text of the test."""
        return sources(Path(sysconfig.get_paths()["stdlib"]))


@cache
def topics() -> tuple[str, str]:
    """All topics for learning and those for the test, each as one text, in the order of their names."""
    from pydoc_data.topics import topics as texts

    return apart([texts[name] for name in sorted(texts)])


@cache
def sources(folder: Path) -> tuple[str, str]:
    """All modules below a folder for learning and those for the test, each as one text, in the order of their paths.

    Raises ValueError where the folder has fewer modules than one test file needs.
    """
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    listed = [path for name, path in sorted(found.items()) if not LEFT_OUT.intersection(name.split("/"))]
    if len(listed) < TEST:
        raise ValueError(
            f"{str(folder)!r} holds {len(listed)} modules of python's standard library, too few for a text; "
            "use a python whose library is installed as files"
        )
    return apart([path.read_text(encoding="utf-8", errors="replace") for path in listed])


def apart(listed: list[str]) -> tuple[str, str]:
    """Join texts to one for learning and one for the test, which has every tenth of them."""
    return "\n".join(t for n, t in enumerate(listed) if n % TEST), "\n".join(listed[::TEST])


def frequent(text: str, count: int) -> dict[str, int]:
    """A number for each of the most frequent characters; what is missing is the last one."""
    found = Counter(text)
    most = sorted(found, key=lambda letter: (-found[letter], letter))[: count - 1]
    return {letter: place for place, letter in enumerate(most)}


def windows(text: str, order: dict[str, int], places: int) -> Tensor:
    """Cut a text into windows of `places` characters and one more, which is the next window's first; uint8."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    known = np.full(int(codes.max(initial=0)) + 1, len(order), dtype=np.uint8)
    for letter, number in order.items():
        if ord(letter) < len(known):
            known[ord(letter)] = number
    numbers = torch.from_numpy(known[codes])
    count = (len(numbers) - 1) // places
    begins = places * torch.arange(count).view(-1, 1)
    return numbers[begins + torch.arange(places + 1)]
