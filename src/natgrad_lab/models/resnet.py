"""The ResNet of CIFAR (He et al. 2015, section 4.2): one convolution, three stages of n basic blocks, 6n + 2
layers.

Each stage halves the image and, by default, doubles the width. All convolutions are 3x3 and have no bias,
because a BatchNorm follows each. Where a block changes shape, its shortcut is either a 1x1 convolution with
its own BatchNorm ("conv", the paper's option B) or has no parameters ("free", option A: skip every second
pixel, add zero channels).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from natgrad_lab.models.architecture import Architecture, he_normal

Shortcut = Literal["conv", "free"]


@dataclass(frozen=True)
class CifarResNet(Architecture):
    """ResNet-6n+2 for small images: 8, 14, 20, 32, 44, 56, 110 layers."""

    depth: int = 20
    """Number of weighted layers on the longest path, 6n + 2."""
    widths: tuple[int, ...] = (16, 32, 64)
    """Channels of each stage; three in the paper."""
    shortcut: Shortcut = "conv"
    """Where the shape changes: a 1x1 convolution, or free of parameters (the paper's option A)."""

    def __post_init__(self) -> None:
        check_depth(self.depth, self.widths)
        if self.shortcut == "free" and list(self.widths) != sorted(self.widths):
            raise ValueError(f'widths={self.widths} shrink, which shortcut="free" cannot follow; use shortcut="conv"')

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        blocks = (self.depth - 2) // (2 * len(self.widths))
        return he_normal(ResidualNet(shape[0], classes, self.widths, blocks, self.shortcut))


class ResidualNet(nn.Module):
    """x [n, channels, h, w] -> logits [n, classes]."""

    def __init__(self, channels: int, classes: int, widths: tuple[int, ...], blocks: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        layers, width = [], widths[0]
        for stage, wide in enumerate(widths):
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                layers.append(BasicBlock(width, wide, stride, shortcut))
                width = wide
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.norm(self.conv(x))))
        return self.head(x.mean(dim=(2, 3)))


class BasicBlock(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(self.shortcut(x) + y)


class FreeShortcut(nn.Module):
    """Every stride-th pixel, with zero channels on both sides to reach the new width."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


def _shortcut(inputs: int, outputs: int, stride: int, kind: Shortcut) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if kind == "free":
        return FreeShortcut(inputs, outputs, stride)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))


def check_depth(depth: int, widths: tuple[int, ...]) -> None:
    """Raise a ValueError for a depth that its stages cannot have, or a stage without channels."""
    blocks, rest = divmod(depth - 2, 2 * len(widths) or 1)
    if blocks < 1 or rest:
        stages = len(widths)
        raise ValueError(f"depth={depth} is not {2 * stages}n + 2 for {stages} stages; try {2 * stages + 2}")
    if min(widths) < 1:
        raise ValueError(f"widths={widths} has a stage without channels; every width must be positive")
