"""What a layer looks like to curvature."""

from natgrad.layers import conv, embedding, linear, norm  # noqa: F401  (they register themselves)
from natgrad.layers.base import Layer, Shape, layer_of
from natgrad.layers.find import Found, find_layers
from natgrad.layers.loose import Loose

__all__ = ["Found", "Layer", "Loose", "Shape", "find_layers", "layer_of"]
