"""One solve for the whole network: the summed Gram of all layers is the Gram of whole gradients.

d = (g - U b) / lambda with b = (lambda I + sum of K_l)^-1 (sum of U_l^T g_l), layer by layer (Chen, Xie and Wang,
arXiv 2310.17556). What travels: [n] numbers a step, and K [n, n] after a measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from natgrad.curvature.per_sample import combine
from natgrad.curvature.sample_space import SampleSpace, solved
from natgrad.layer_state import LayerState
from natgrad.layers.layer import Shape
from natgrad.linalg import damped_cholesky
from natgrad.optim.segments import Segment
from natgrad.parallel import World


class Network:
    """Natural gradients of all layers at once. It keeps the factor of the summed Gram and when it was made."""

    def __init__(self, world: World, cells: Any, groups: Any):
        self.world = world
        self.cells = cells  # a function: layers may turn out to be without curvature
        self.groups = groups
        self.forget()

    def forget(self) -> None:
        """Another state was loaded: make the factor anew."""
        self.made: tuple = ()
        self.root = torch.empty(0)

    def __call__(self, segments: Sequence[Segment], gradients: Sequence[Tensor]) -> list[Tensor]:
        cells: list[LayerState] = [c for c in self.cells() if c.by_rows and c.ready]
        if not cells:
            return [g.clone() for g in gradients]
        damping = self._damping(cells)
        made = (damping, *(c.clock(c.keys[0])[3] for c in cells))
        if made != self.made:
            self.root = self._factor(cells, damping)
            self.made = made
        return self._solve(segments, gradients, damping)

    def _damping(self, cells: Sequence[LayerState]) -> float:
        dampings = {self.groups(c.layer.parameters[0])["damping"] for c in cells}
        if len(dampings) > 1:
            raise ValueError(
                f'block="network" solves for all layers at once, but groups have damping {sorted(dampings)}: '
                'give all the same, or take block="layer"'
            )
        return dampings.pop()

    def _factor(self, cells: Sequence[LayerState], damping: float) -> Tensor:
        grams = [c.state()[c.keys[0]][0] for c in cells if c.owner == self.world.rank]
        sizes = [len(g) for g in grams]
        most, least = torch.tensor([max(sizes, default=0)]), torch.tensor([-min(sizes, default=2**30)])
        self.world.max([most, least], "scalars")
        high, low = int(most), -int(least)
        if high != low:
            raise ValueError(
                f'block="network" needs the same samples in all layers, but there are {low} to {high}: '
                'some fold other dimensions into the first or exceed the budget; take block="layer"'
            )
        weight = cells[0].layer.parameters[0]
        total = cells[0].zeros((high, high)).to(weight.device)
        for gram in grams:
            total += gram
        self.world.sum_over_owners([total], "statistics")
        root, _ = damped_cholesky(total.unsqueeze(0), total.new_full((1,), damping))
        return root[0]

    def _solve(self, segments: Sequence[Segment], gradients: Sequence[Tensor], damping: float) -> list[Tensor]:
        inner = self.root.new_zeros(len(self.root) + 2)  # and: how many layers there are, how many U c makes up
        pieces = [segment.pieces(gradient) for segment, gradient in zip(segments, gradients)]
        kept = [[cell.kept() for cell in segment.cells] for segment in segments]
        for segment, gradient, rows, parts in zip(segments, gradients, kept, pieces):
            for place, cell, k, piece in zip(segment.outline.places, segment.cells, rows, parts):
                curvature: SampleSpace = cell.curvature  # type: ignore[assignment]
                inner[:-2] += curvature.against(k, piece).to(inner)
                inner[-2] += 1
                if place in segment.fresh and gradient is segment.gradient and curvature.legacy is None:
                    inner[-1] += curvature.makes_up(k, piece)
        self.world.sum_over_owners([inner], "scalars")
        whole = bool(inner[-1] == inner[-2])
        b = None if whole else solved(self.root, inner[:-2])
        directions = []
        for segment, rows, parts in zip(segments, kept, pieces):
            found = []
            for cell, k, piece in zip(segment.cells, rows, parts):
                if b is None:
                    found.append(combine(k, solved(self.root, k["mean"]), Shape(*piece.shape)))
                else:
                    found.append(cell.curvature.without(k, piece, b, damping))  # type: ignore[attr-defined]
            directions.append(torch.cat([one.reshape(-1) for one in found]))
        return directions
