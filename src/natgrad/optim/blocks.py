"""Which curvature a layer gets: functions from layers to curvatures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from natgrad.curvature import Curvature, Full, Identity, Kronecker, UnitWise
from natgrad.layers import Layer, UncurvedParameter
from natgrad.layers.norm import Norm

Blocks = Callable[[Layer, "int | None", int], Curvature]
"""blocks(layer, rows_per_dim, max_size) -> its curvature."""


@dataclass(frozen=True)
class LayerBlocks:
    """One curvature for matrices and one for normalisations. Both are made from `rows_per_dim`.

    A side of a matrix above `max_size` is kept diagonal. What has no curvature gets none.

    Args:
        matrix: how factors are inverted: Kronecker, by Cholesky, or EigenKronecker: eigenvectors are dearer, but follow
            every change of the damping.
        norm: curvature of normalisations: UnitWise, a 2x2 block for each channel; Full, one block for all of a layer
            (above `max_size` unit-wise); Identity, none; or a partial of one, such as partial(Full, coefficient=16) for
            the block of SP-NGD's release.

    """

    matrix: Callable[..., Curvature] = Kronecker
    norm: Callable[[int | None], Curvature] = UnitWise

    def __call__(self, layer: Layer, rows_per_dim: int | None, max_size: int) -> Curvature:
        if isinstance(layer, UncurvedParameter):
            return Identity()
        if isinstance(layer, Norm):
            curvature = self.norm(rows_per_dim)
            if isinstance(curvature, Full) and layer.shape.numel > max_size:
                return UnitWise(rows_per_dim, curvature.coefficient)
            return curvature
        wide_a = layer.diagonal_inputs or layer.shape.inner > max_size
        return self.matrix(rows_per_dim, diagonal_a=wide_a, diagonal_g=layer.shape.out > max_size)


spngd_blocks = LayerBlocks()
"""SP-NGD: Kronecker factors, and unit-wise 2x2 blocks for normalisations (section 4.2)."""

kfac_blocks = LayerBlocks(norm=Identity)
"""K-FAC: Kronecker factors; normalisations take the plain gradient."""
