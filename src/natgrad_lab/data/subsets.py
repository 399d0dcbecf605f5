"""Smaller problems made of a data set: some of its classes, some of its images, or all of them with fewer pixels."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from natgrad_lab.data.images import Images, stratified


def first_classes(images: Images, count: int) -> Images:
    """Return the images of the first `count` classes, which keep their labels 0 to count - 1."""
    if count == images.classes:
        return images
    return replace(images.take((images.labels < count).nonzero().flatten()), classes=count)


def drawn(images: Images, count: int, seed: int = 0) -> Images:
    """Return `count` of the images, every class in proportion, drawn by the seed and in their old order."""
    if not 1 <= count <= len(images):
        raise ValueError(f"subset={count} must be between 1 and the {len(images)} images; set --data.subset")
    return images.take(stratified(images.labels, count / len(images), seed)[1])


def shrunk(images: Images, size: int) -> Images:
    """Return images [n, c, h, h] in memory at `size` x `size` pixels, a divisor of h, each the mean of a square.

    Bytes stay bytes, rounded.
    """
    raw = images.images
    if not isinstance(raw, Tensor) or raw.shape[-1] == size:
        return images
    small = [F.avg_pool2d(some.float(), raw.shape[-1] // size) for some in raw.split(4096)]
    whole = torch.cat([some if raw.is_floating_point() else some.round().to(raw.dtype) for some in small])
    return replace(images, images=whole)
