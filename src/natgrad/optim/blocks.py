"""Which curvature a layer gets: functions from layers to curvatures."""

from __future__ import annotations

from collections.abc import Callable

from natgrad.curvature import Curvature, Identity, Kronecker, UnitWise
from natgrad.layers import Layer, Loose
from natgrad.layers.norm import Norm

Blocks = Callable[[Layer, "int | None", int], Curvature]
"""blocks(layer, samples, max_size) -> its curvature."""


def spngd_blocks(layer: Layer, samples: int | None, max_size: int) -> Curvature:
    """SP-NGD: Kronecker factors, and unit-wise 2x2 blocks for normalisations (section 4.2)."""
    if isinstance(layer, Norm):
        return UnitWise(samples)
    return kfac_blocks(layer, samples, max_size)


def kfac_blocks(layer: Layer, samples: int | None, max_size: int) -> Curvature:
    """K-FAC: Kronecker factors, a side above `max_size` diagonal; normalisations take the plain gradient."""
    if isinstance(layer, (Norm, Loose)):
        return Identity()
    wide_a = layer.diagonal_inputs or layer.shape.inner > max_size
    return Kronecker(samples, diagonal_a=wide_a, diagonal_g=layer.shape.out > max_size)
