"""Variations of a batch, on whatever device the batch is: kornia's transforms, with draws from the caller's generator.

kornia's own random augmentations draw from torch's global generator; so its transforms are told here what was drawn.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def flip(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image [n, c, h, w] left to right with probability one half."""
    from kornia.geometry.transform import hflip

    heads = torch.rand(len(inputs), generator=generator) < 0.5
    return torch.where(heads.to(inputs.device).view(-1, 1, 1, 1), hflip(inputs), inputs)


def pad_crop(inputs: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Shift each image by up to `padding` pixels both ways, zeros coming in from the border."""
    corners = torch.randint(0, 2 * padding + 1, (2, len(inputs)), generator=generator) - padding
    return windows(inputs, corners, inputs.shape[2], inputs.shape[3])


def windows(inputs: Tensor, corners: Tensor, height: int, width: int) -> Tensor:
    """Cut height x width out of each image [n, c, h, w], its upper left at corners [2, n] (row, column), as floats.

    Where a window leaves the image it holds zeros. Pixels are moved, not blended.
    """
    from kornia.geometry.transform import warp_affine

    floats = inputs if inputs.is_floating_point() else inputs.float()
    moves = torch.eye(2, 3, dtype=floats.dtype).repeat(floats.shape[0], 1, 1)
    moves[:, :, 2] = -corners.flip(0).T  # kornia counts (column, row)
    moves = moves.to(floats.device)
    return warp_affine(floats, moves, (height, width), mode="nearest", padding_mode="zeros", align_corners=True)


@dataclass(frozen=True)
class Crop:
    """A square of `size` pixels out of each raw image: at random while learning, in the middle otherwise."""

    size: int
    random: bool = False

    def __call__(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        top, left = (images.shape[2] - self.size, images.shape[3] - self.size)
        if generator is None or not self.random:
            return images[:, :, top // 2 :, left // 2 :][:, :, : self.size, : self.size]
        room = torch.tensor([[top], [left]])
        corners = (torch.rand((2, len(images)), generator=generator) * (room + 1)).floor().long()
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
        from kornia.geometry.transform import warp_affine

        maps = self.draw(len(images), images.shape[2], images.shape[3], generator).to(images.device)
        square = (self.size, self.size)
        return warp_affine(images.float(), maps, square, padding_mode="border", align_corners=True)

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """`count` maps [n, 2, 3] from pixels (column, row) of an image to those of its part."""
        u = torch.rand((4, count), generator=generator, dtype=torch.float32)
        share = self.area[0] + u[0] * (self.area[1] - self.area[0])
        ratio = (4 / 3) ** (2 * u[1] - 1)
        tall, wide = ((share * r).sqrt().clamp_max(1.0) for r in (ratio, 1 / ratio))
        across, down = self.size / (wide * width), self.size / (tall * height)
        maps = torch.zeros(count, 2, 3, dtype=torch.float32)
        maps[:, 0, 0], maps[:, 1, 1] = across, down
        left, top = (1 - wide) * width * u[2], (1 - tall) * height * u[3]
        maps[:, 0, 2] = (0.5 - left) * across - 0.5  # a pixel's centre lies half a pixel from its edge
        maps[:, 1, 2] = (0.5 - top) * down - 0.5
        return maps


@dataclass(frozen=True)
class CropFlip:
    """The usual augmentation of CIFAR: shift by up to `padding` pixels, then mirror half of the images."""

    padding: int = 4

    def __call__(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        return flip(pad_crop(inputs, generator, self.padding), generator)


crop_and_flip = CropFlip()
