"""A multi-layer perceptron: flatten, then linear layers with ReLU between them."""

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from natgrad_lab.models.architecture import Architecture, he_normal


@dataclass(frozen=True)
class Mlp(Architecture):
    """Fully connected layers on the flattened image."""

    hidden: tuple[int, ...] = (128, 128)
    """Width of each hidden layer."""

    def __post_init__(self) -> None:
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden={self.hidden} has a layer without units; every width must be positive")

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        widths = (math.prod(shape), *self.hidden)
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return he_normal(nn.Sequential(*layers, nn.Linear(widths[-1], classes)))
