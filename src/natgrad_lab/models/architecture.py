"""An architecture is the description of a network: it builds one as soon as it knows the data's shape."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """What a recipe names as its model; each file of this folder defines one kind."""

    def load(self) -> None:
        """Import what `build` needs, so that an import that draws random numbers comes before these are seeded."""

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Return a freshly initialised network for images of shape (channels, height, width)."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to build itself")


def he_normal(model: nn.Module) -> nn.Module:
    """Draw weights from N(0, 2 / fan_in), zero the biases (He et al. 2015); norms start as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
