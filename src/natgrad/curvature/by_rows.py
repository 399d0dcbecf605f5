"""What a curvature over rows of samples adds: rows become a matrix that is factored, and tensors that are kept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from natgrad.curvature.curvature import Curvature
from natgrad.curvature.per_sample import Sample
from natgrad.layers.layer import Shape


class ByRows(Curvature):
    """A curvature with one statistic of the kind Rows.

    `precondition` gets the factor under the statistic's name and what was kept under the names in `stored`, and
    "fresh" beside them if the rows were measured in this very step, on all samples.
    """

    stored: tuple[str, ...]

    @abstractmethod
    def digest(self, rows: Sample, shape: Shape, generator: torch.Generator) -> tuple[Tensor, Sample]:
        """The matrices [b, n, n] that `factor` takes, and what else is kept, from the rows of all ranks."""

    def precondition_all(
        self,
        kept: Sequence[Mapping[str, Tensor]],
        gradients: Sequence[Tensor],
        damping: float,
        fresh: Sequence[Sequence[bool]],
    ) -> list[Tensor]:
        """`precondition` for groups of layers, of which those of a group are alike: all tensors are [layers, ...].

        fresh: whether the rows of each layer of each group were measured in this very step, on all samples.
        """
        found = []
        for own, gradient, told in zip(kept, gradients, fresh):
            each = [dict(zip(own, one)) | ({"fresh": one[0]} if new else {}) for *one, new in zip(*own.values(), told)]
            found.append(torch.stack([self.precondition(one, g, damping) for one, g in zip(each, gradient)]))
        return found
