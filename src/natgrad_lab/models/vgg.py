"""VGG-16 with BatchNorm (Simonyan and Zisserman 2014, configuration D): 3x3 convolutions, five halvings of the image.

After the convolutions, images of 32x32 are single pixels of 512 channels. The networks that are called VGG16 on CIFAR
differ in what follows: the full classifier on a 7x7 copy of that pixel (134.3 M weights; SENG's release), two hidden
layers of 512 (15.3 M), or none (14.7 M).
"""

from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from natgrad_lab.models.architecture import Architecture, he_normal

STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))  # width over the first's, and convolutions


@dataclass(frozen=True)
class Vgg16(Architecture):
    """VGG-16 with BatchNorm."""

    hidden: tuple[int, ...] = (4096, 4096)
    """Widths of the classifier's hidden layers; () for none."""
    pooled: int = 7
    """Height and width to which the last image is pooled or copied before the classifier."""
    dropout: float = 0.5
    """Share of the hidden units that are left out while learning."""

    width: int = 64
    """Channels of the first stage; the others have two, four, eight and eight times as many."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width={self.width}: give a positive number of channels, such as 64")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden={self.hidden} has a layer without units; every width must be positive")
        if self.pooled < 1:
            raise ValueError(f"pooled={self.pooled} must be positive; 1 is one pixel, 7 the full classifier's")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout:g} must be at least 0 and below 1")

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        if min(shape[1:]) < 32:
            raise ValueError(f"images of {shape[1]}x{shape[2]} cannot be halved five times; VGG-16 needs 32x32")
        layers = [*features(shape[0], self.width), nn.AdaptiveAvgPool2d(self.pooled), nn.Flatten()]
        widths = (STAGES[-1][0] * self.width * self.pooled**2, *self.hidden)
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace=True), nn.Dropout(self.dropout)]
        return he_normal(nn.Sequential(*layers, nn.Linear(widths[-1], classes)))


def features(channels: int, width: int) -> list[nn.Module]:
    """The thirteen convolutions, with bias as in the paper, their norms, and the poolings."""
    layers: list[nn.Module] = []
    for times, count in STAGES:
        for _ in range(count):
            conv = nn.Conv2d(channels, times * width, 3, padding=1)
            layers += [conv, nn.BatchNorm2d(times * width), nn.ReLU(inplace=True)]
            channels = times * width
        layers.append(nn.MaxPool2d(2))
    return layers
