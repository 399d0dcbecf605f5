"""Variations of a batch as plain tensor functions, on whatever device the batch is."""

import torch
from torch import Tensor
from torch.nn import functional as F


def flip(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability one half."""
    heads = torch.rand(len(inputs), generator=generator) < 0.5
    return torch.where(heads.to(inputs.device).view(-1, 1, 1, 1), inputs.flip(-1), inputs)


def pad_crop(inputs: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Shift each image by up to `padding` pixels both ways, zeros coming in from the border."""
    n, channels, height, width = inputs.shape
    shifts = torch.randint(0, 2 * padding + 1, (2, n), generator=generator).to(inputs.device)
    rows = shifts[0].view(-1, 1) + torch.arange(height, device=inputs.device)
    columns = shifts[1].view(-1, 1) + torch.arange(width, device=inputs.device)
    padded = F.pad(inputs, (padding,) * 4)
    images = torch.arange(n, device=inputs.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=inputs.device).view(1, -1, 1, 1)
    return padded[images, channel, rows.view(n, 1, -1, 1), columns.view(n, 1, 1, -1)]


def crop_and_flip(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """The usual augmentation of CIFAR: shift by up to four pixels, then mirror half of the images."""
    return flip(pad_crop(inputs, generator), generator)
