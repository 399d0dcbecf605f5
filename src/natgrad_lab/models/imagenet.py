"""The ResNets of ImageNet (He et al. 2015, table 1): a 7x7 stem, four stages, and the D variant (He et al. 2018).

ResNet-D changes three things: the stem is three 3x3 convolutions, the stride of a bottleneck sits on its 3x3, and a
shortcut that halves the image averages 2x2 pixels before its 1x1. The plain variant here puts the stride on the 3x3
too, as all common releases do.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from natgrad_lab.models.architecture import Architecture, he_normal

STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


@dataclass(frozen=True)
class ImageResNet(Architecture):
    """ResNet-18, 34 (basic blocks), 50 or 101 (bottlenecks)."""

    depth: Literal[18, 34, 50, 101] = 50
    """Number of weighted layers on the longest path."""
    width: int = 64
    """Channels of the stem; 64 in the paper."""
    deep_stem: bool = False
    """The D variant: three 3x3 convolutions as the stem, averaging shortcuts."""
    zero_last: bool = False
    """Let each block begin as its shortcut: the gamma of its last BatchNorm is zero (Goyal et al. 2017)."""

    def __post_init__(self) -> None:
        if self.depth not in STAGES:
            raise ValueError(f"depth={self.depth} is not one of {', '.join(map(str, STAGES))}")
        if self.width < 1:
            raise ValueError(f"width={self.width}: give a positive number of channels, such as 64")

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        model = he_normal(ImageNetwork(shape[0], classes, self.depth, self.width, self.deep_stem))
        if self.zero_last:
            for block in model.modules():
                if isinstance(block, Residual):
                    nn.init.zeros_(block.last_norm().weight)
        return model


class ImageNetwork(nn.Sequential):
    """x [n, channels, h, w] -> logits [n, classes]."""

    def __init__(self, channels: int, classes: int, depth: int, width: int, deep: bool) -> None:
        block = Basic if depth < 50 else Bottleneck
        layers: list[nn.Module] = [*stem(channels, width, deep), nn.MaxPool2d(3, 2, padding=1)]
        inputs = width
        for stage, count in enumerate(STAGES[depth]):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                layers.append(block(inputs, width * 2**stage, stride, deep))
                inputs = width * 2**stage * block.expansion
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def stem(channels: int, width: int, deep: bool) -> list[nn.Module]:
    """What comes before the pooling."""
    if not deep:
        return [*conv_norm(channels, width, 7, 2), nn.ReLU(inplace=True)]
    layers = []
    for inputs, outputs, stride in ((channels, width // 2, 2), (width // 2, width // 2, 1), (width // 2, width, 1)):
        layers += [*conv_norm(inputs, outputs, 3, stride), nn.ReLU(inplace=True)]
    return layers


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """A convolution without bias and its BatchNorm."""
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class Residual(nn.Module):
    """relu(body(x) + shortcut(x))."""

    expansion = 1

    def __init__(self, body: list[nn.Module], inputs: int, outputs: int, stride: int, deep: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        shortcut: list[nn.Module] = []
        if stride != 1 or inputs != outputs:
            if deep and stride != 1:
                shortcut.append(nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False))
            shortcut += conv_norm(inputs, outputs, 1, 1 if deep else stride)
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.shortcut(x)).relu()

    def last_norm(self) -> nn.BatchNorm2d:
        """The norm before the sum."""
        norm = self.body[-1]
        assert isinstance(norm, nn.BatchNorm2d)
        return norm


class Basic(Residual):
    """Two 3x3 convolutions."""

    def __init__(self, inputs: int, width: int, stride: int, deep: bool) -> None:
        body = [*conv_norm(inputs, width, 3, stride), nn.ReLU(inplace=True), *conv_norm(width, width, 3)]
        super().__init__(body, inputs, width, stride, deep)


class Bottleneck(Residual):
    """1x1 down, 3x3, 1x1 up to four times the width."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, deep: bool) -> None:
        body = [
            *conv_norm(inputs, width, 1),
            nn.ReLU(inplace=True),
            *conv_norm(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *conv_norm(width, 4 * width, 1),
        ]
        super().__init__(body, inputs, 4 * width, stride, deep)
