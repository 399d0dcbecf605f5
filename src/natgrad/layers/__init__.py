"""What a layer looks like to curvature."""

from natgrad.layers import conv, embedding, linear, norm  # noqa: F401  (they register themselves)
from natgrad.layers.layer import Layer, Shape, layer_of
from natgrad.layers.registry import FoundLayer, find_layers
from natgrad.layers.uncurved import UncurvedParameter

__all__ = ["FoundLayer", "Layer", "Shape", "UncurvedParameter", "find_layers", "layer_of"]
