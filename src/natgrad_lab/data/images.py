"""A data set is a few tensors in memory: raw images on the device, labels, and what turns raw values into
inputs.

Kept as uint8, CIFAR takes 150 MB; a batch is an index, a cast and one multiply-add on the device. What is too large
for that stays in its files (pictures.py).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from natgrad_lab.data.pictures import Bad, Pictures

T = TypeVar("T")

Augment = Callable[[Tensor, torch.Generator], Tensor]


Cut = Callable[[Tensor, "torch.Generator | None"], Tensor]
"""Takes a part of each raw image; without a generator always the same part."""


def as_they_are(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Leave a batch unchanged: the augmentation of data that has none."""
    return inputs


def whole(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Take all of each image."""
    return images


@dataclass(frozen=True)
class Images:
    """n images with their labels, and the mean and deviation of their channels in raw units."""

    images: Tensor | Pictures
    """[n, channels, height, width], uint8 or float, raw values."""
    labels: Tensor
    """[n], int64."""
    classes: int
    mean: tuple[float, ...] | Tensor
    """Of each channel, or an image [channels, height, width] of what `cut` leaves."""
    std: tuple[float, ...]
    cut: Cut = whole
    each: bool = False
    """Every image is normalised by its own mean and deviation (TensorFlow's per-image standardisation) instead."""
    bad: Bad = field(default_factory=Bad)
    """Those that could not be decoded, so far."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        return self.labels.device

    def to(self, device: torch.device) -> "Images":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def take(self, index: Tensor) -> "Images":
        """Return the images at these places as a data set of their own."""
        index = index.to(self.device)
        images = self.images[index] if isinstance(self.images, Tensor) else self.images.take(index)
        return replace(self, images=images, labels=self.labels[index])

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return inputs [n, channels, height, width] in float, cut and normalised, and labels [n].

        With a generator, for learning: what is cut out of an image may be drawn anew.
        """
        raw, places = self.raw(index)
        inputs, labels = self.cut(raw, generator).float(), self.labels[places]
        if self.each:
            return standardised(inputs), labels
        if isinstance(self.mean, Tensor):
            std = inputs.new_tensor(self.std).view(-1, 1, 1)
            return (inputs - self.mean.to(inputs)) / std, labels
        from kornia.enhance import normalize

        return normalize(inputs, inputs.new_tensor(self.mean), inputs.new_tensor(self.std)), labels

    def raw(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return raw images, and the places of those that they are: others stand in for what cannot be decoded."""
        if isinstance(self.images, Pictures):
            return self.images.read(index)
        index = index.to(self.device)
        return self.images[index], index

    def decoded(self) -> "Images":
        """Return the same with all images in memory."""
        if not isinstance(self.images, Pictures):
            return self
        pixels, places = self.images.everything()
        return replace(self, images=pixels, labels=self.labels[places])


def standardised(inputs: Tensor) -> Tensor:
    """Return each image [n, c, h, w] less its own mean, over its own deviation."""
    floor = inputs[0].numel() ** -0.5  # images of one colour
    std = inputs.std(dim=(1, 2, 3), keepdim=True, correction=0).clamp_min(floor)
    return (inputs - inputs.mean(dim=(1, 2, 3), keepdim=True)) / std


def read_ahead(data: T, indices: Iterable[Tensor]) -> T:
    """Return the same data, of which these indices are read before they are asked for, where that takes time."""
    if isinstance(data, Images) and isinstance(data.images, Pictures):
        return replace(data, images=data.images.ahead(indices))
    return data


@dataclass(frozen=True)
class Splits:
    """What to learn from, what to be judged by, and how inputs are varied while learning."""

    train: Images
    test: Images
    augment: Augment = as_they_are

    def to(self, device: torch.device) -> "Splits":
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def bad(self) -> list[str]:
        """Return the images that could not be decoded so far, each with the reason."""
        return sorted({*self.train.bad.names(), *self.test.bad.names()})


@dataclass(frozen=True)
class Source:
    """Where a recipe's data come from; each file of this folder defines one kind."""

    def shape(self) -> tuple[int, int, int]:
        """Return (channels, height, width) without reading the images."""
        raise NotImplementedError(f"{type(self).__name__} does not say its shape")

    def classes(self) -> int:
        """Return the number of classes without reading the images."""
        raise NotImplementedError(f"{type(self).__name__} does not say its number of classes")

    def check(self) -> None:
        """Raise ValueError where the data are not to be found."""

    def load(self) -> Splits:
        """Read everything into memory, on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to load itself")


def stratified(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split places into (kept, held), round(share x n) of them held, every class in proportion."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels.cpu()[order].argsort(stable=True)]  # class by class, shuffled within each
    count = round(share * len(labels))
    marks = ((torch.arange(count) + 0.5) * len(labels) / max(count, 1)).long()  # evenly spaced: so many of each class
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[marks] = True
    return order[~held].sort().values, order[held].sort().values


def hold_out(splits: Splits, share: float, seed: int) -> Splits:
    """Take a stratified part of the training images as the test images, the rest for training."""
    if not 0 < share < 1:
        raise ValueError(f"share={share:g} of the training images to hold out must lie between 0 and 1")
    kept, held = stratified(splits.train.labels, share, seed)
    return replace(splits, train=splits.train.take(kept), test=splits.train.take(held))
