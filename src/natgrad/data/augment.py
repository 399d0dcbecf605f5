"""Variations of a batch as plain tensor functions, on whatever device the batch is."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def flip(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability one half."""
    heads = torch.rand(len(inputs), generator=generator) < 0.5
    return torch.where(heads.to(inputs.device).view(-1, 1, 1, 1), inputs.flip(-1), inputs)


def pad_crop(inputs: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Shift each image by up to `padding` pixels both ways, zeros coming in from the border."""
    corners = torch.randint(0, 2 * padding + 1, (2, len(inputs)), generator=generator)
    return windows(F.pad(inputs, (padding,) * 4), corners, inputs.shape[2], inputs.shape[3])


def windows(inputs: Tensor, corners: Tensor, height: int, width: int) -> Tensor:
    """Cut height x width out of each image [n, c, h, w], its upper left at corners [2, n] (row, column)."""
    n, channels = inputs.shape[:2]
    corners = corners.to(inputs.device)
    rows = corners[0].view(-1, 1) + torch.arange(height, device=inputs.device)
    columns = corners[1].view(-1, 1) + torch.arange(width, device=inputs.device)
    images = torch.arange(n, device=inputs.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=inputs.device).view(1, -1, 1, 1)
    return inputs[images, channel, rows.view(n, 1, -1, 1), columns.view(n, 1, 1, -1)]


@dataclass(frozen=True)
class Crop:
    """A square of `size` pixels out of each raw image: at random while learning, in the middle otherwise."""

    size: int
    random: bool = False

    def __call__(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        n, _, height, width = images.shape
        room = torch.tensor([[height - self.size], [width - self.size]])
        if generator is None or not self.random:
            corners = (room // 2).expand(2, n)
        else:
            corners = (torch.rand((2, n), generator=generator) * (room + 1)).floor().long()
        return windows(images, corners, self.size, self.size)


@dataclass(frozen=True)
class Zoom:
    """A part of each raw image, brought to `size` x `size` pixels: Inception's crops (Szegedy et al. 2014).

    The part's share of the image is uniform in `area`, the ratio of its sides log-uniform from 3/4 to 4/3, and it lies
    anywhere that it fits. Pixels are interpolated bilinearly. Without a generator it is the middle, as of Crop.
    """

    size: int
    area: tuple[float, float] = (0.08, 1.0)

    def __call__(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is None:
            return Crop(self.size)(images, None)
        n, channels = images.shape[:2]
        u = torch.rand((4, n), generator=generator)
        share = self.area[0] + u[0] * (self.area[1] - self.area[0])
        ratio = (4 / 3) ** (2 * u[1] - 1)
        tall, wide = ((share * r).sqrt().clamp_max(1.0) for r in (ratio, 1 / ratio))
        maps = torch.zeros(n, 2, 3)  # from the cut's coordinates, -1 to 1, to the image's
        maps[:, 0, 0], maps[:, 1, 1] = wide, tall
        maps[:, 0, 2], maps[:, 1, 2] = (1 - wide) * (2 * u[2] - 1), (1 - tall) * (2 * u[3] - 1)
        grid = F.affine_grid(maps.to(images.device), [n, channels, self.size, self.size], align_corners=False)
        return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class CropFlip:
    """The usual augmentation of CIFAR: shift by up to `padding` pixels, then mirror half of the images."""

    padding: int = 4

    def __call__(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        return flip(pad_crop(inputs, generator, self.padding), generator)


crop_and_flip = CropFlip()
