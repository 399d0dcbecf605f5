"""The pre-activation ResNet of CIFAR (He et al. 2016, "v2"), as the release of NLCG has it (arXiv 1812.02886).

A block is conv(relu(norm(conv(relu(norm(x)))))) + shortcut. Each stage begins with a 1x1 convolution as its shortcut,
of relu(norm(x)) and without a norm of its own; the others' is x. One norm more follows the last block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from natgrad_lab.models.architecture import Architecture
from natgrad_lab.models.resnet import check_depth


@dataclass(frozen=True)
class PreActResNet(Architecture):
    """ResNet-6n+2 v2 for small images; weights drawn as TensorFlow's variance scaling does, dense as Glorot's."""

    depth: int = 32
    """Number of weighted layers on the longest path, 6n + 2."""
    widths: tuple[int, ...] = (16, 32, 64)
    """Channels of each stage."""

    def __post_init__(self) -> None:
        check_depth(self.depth, self.widths)

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        blocks = (self.depth - 2) // (2 * len(self.widths))
        return variance_scaling(PreActNet(shape[0], classes, self.widths, blocks))


class PreActNet(nn.Module):
    """x [n, channels, h, w] -> logits [n, classes]."""

    def __init__(self, channels: int, classes: int, widths: tuple[int, ...], blocks: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        layers, width = [], widths[0]
        for stage, wide in enumerate(widths):
            for index in range(blocks):
                layers.append(PreActBlock(width, wide, 2 if stage > 0 and index == 0 else 1, index == 0))
                width = wide
        self.blocks = nn.Sequential(*layers)
        self.norm = norm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.blocks(self.conv(x)))).mean(dim=(2, 3)))


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after a norm and a relu, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, project: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(inputs), norm(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if project else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(x))
        beside = x if self.shortcut is None else self.shortcut(y)
        return beside + self.conv2(torch.relu(self.norm2(self.conv1(y))))


def norm(width: int) -> nn.BatchNorm2d:
    """A BatchNorm with the release's decay of 0.99."""
    return nn.BatchNorm2d(width, eps=1e-5, momentum=0.01)


def variance_scaling(model: nn.Module) -> nn.Module:
    """Convolutions from a normal distribution cut at two deviations, of variance 1 / fan_in; dense ones as Glorot's."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            std = fan_in**-0.5 / 0.87962566103423978  # what cutting at two deviations leaves of one
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return model
