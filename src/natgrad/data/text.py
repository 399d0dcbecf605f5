"""Texts: the next character of a window of characters, from a text that ships with python.

A window of `places` characters gives `places` samples of the loss, each to be predicted from those before it. Windows
do not overlap, so what is held out shares no character with what is learned from.
"""

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from natgrad.data.images import Source, Splits
from natgrad.data.pictures import Bad

TEST = 10
"""Every tenth topic is for the test."""


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

    def load(self) -> Splits:
        train, test = topics()
        order = frequent(train, self.alphabet)
        made: list[Any] = [Texts(windows(text, order, self.places), self.alphabet) for text in (train, test)]
        return Splits(*made)


@cache
def topics() -> tuple[str, str]:
    """All topics for learning and those for the test, each as one text, in the order of their names."""
    from pydoc_data.topics import topics as texts

    listed = [texts[name] for name in sorted(texts)]
    return "\n".join(t for n, t in enumerate(listed) if n % TEST), "\n".join(listed[::TEST])


def frequent(text: str, count: int) -> dict[str, int]:
    """A number for each of the most frequent characters; what is missing is the last one."""
    found: dict[str, int] = {}
    for letter in text:
        found[letter] = found.get(letter, 0) + 1
    most = sorted(found, key=lambda letter: (-found[letter], letter))[: count - 1]
    return {letter: place for place, letter in enumerate(most)}


def windows(text: str, order: dict[str, int], places: int) -> Tensor:
    """Cut a text into windows of `places` characters and one more, which is the next window's first; uint8."""
    numbers = torch.tensor([order.get(letter, len(order)) for letter in text], dtype=torch.uint8)
    count = (len(numbers) - 1) // places
    begins = places * torch.arange(count).view(-1, 1)
    return numbers[begins + torch.arange(places + 1)]
