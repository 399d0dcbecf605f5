"""From statistics to damped inverses, over all layers and ranks, in three moves.

divide    how much damping each statistic gets; holders of one layer on several ranks sum up their traces (a small sum)
invert    every holder inverts what it holds, statistics of one size in one call
deliver   inverses made elsewhere go to their layers' owners
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from natgrad.cell import Cell
from natgrad.parallel import Parcel, World

Job = tuple[int, str]  # a cell's place and one of its statistics

TOGETHER = 2**24  # numbers that are inverted in one call: more would double the memory that a large layer needs


class Inversion:
    """The inversions of one step: `jobs`, the same on every rank, with each cell's damping."""

    def __init__(self, cells: Sequence[Cell], world: World, jobs: Sequence[Job], dampings: Sequence[float]):
        self.cells, self.world, self.dampings = cells, world, dampings
        self.jobs = list(jobs)
        self.parts: dict[Job, Tensor] = {}
        self.made: dict[Job, Tensor] = {}

    def divide(self) -> None:
        """The damping [b] of every statistic that this rank holds, by the traces of all statistics of its layer."""
        traces: dict[Job, Tensor] = {}
        indices = list(dict.fromkeys(index for index, _ in self.jobs))
        for index in indices:
            cell = self.cells[index]
            for moment in cell.curvature.statistics:
                if cell.holders[moment.key] == self.world.rank:
                    traces[index, moment.key] = cell.trace(moment.key)
                elif cell.split:
                    traces[index, moment.key] = cell.zeros(moment.shape(cell.layer)[:1])
        self.world.sum([trace for (index, _), trace in traces.items() if self.cells[index].split], "scalars")
        for index in indices:
            own = {key: traces[index, key] for key in self.cells[index].keys if (index, key) in traces}
            if own:
                parts = self.cells[index].curvature.split(own, self.dampings[index])
                self.parts |= {(index, key): part for key, part in parts.items()}

    def invert(self) -> int:
        """Make the inverses that fall to this rank. Returns how many retries they took."""
        retries = 0
        for curvature, key, batch in self._batches():
            statistics = [self.cells[index].state()[key] for index in batch]
            joined = torch.cat(statistics) if len(batch) > 1 else statistics[0]
            inverse, tries = curvature.factor(key, joined, torch.cat([self.parts[index, key] for index in batch]))
            retries += tries
            for index, part in zip(batch, inverse.split([len(s) for s in statistics])):
                self.made[index, key] = part
        for index, key in self.jobs:
            cell = self.cells[index]
            cell.numbers[f"{key}_damping"] = self.dampings[index]
            if cell.owner == self.world.rank and (index, key) in self.made:
                cell.state()[f"{key}_inverse"].copy_(self.made[index, key])
        return retries

    def _batches(self):
        """(curvature, statistic, cells) whose statistics have one size and one formula."""
        alike: dict[Any, list[int]] = defaultdict(list)
        for index, key in self.jobs:
            cell = self.cells[index]
            if cell.holders[key] == self.world.rank:
                statistic = cell.state()[key]
                alike[cell.curvature, key, statistic.shape[1:], statistic.dtype, statistic.device].append(index)
        for (curvature, key, shape, *_), indices in alike.items():
            most = max(1, TOGETHER // max(shape.numel(), 1))
            for start in range(0, len(indices), most):
                yield curvature, key, indices[start : start + most]

    def deliver(self) -> None:
        """Send inverses of layers that are split over ranks to their owners."""
        parcels, sources = [], []
        for index, key in self.jobs:
            cell = self.cells[index]
            if cell.holders[key] == cell.owner:
                continue
            moment = next(m for m in cell.curvature.statistics if m.key == key)
            inverse = self.made.get((index, key), cell.state().get(f"{key}_inverse"))
            if inverse is None:  # neither from here nor to here
                inverse = cell.zeros(cell.curvature.inverse_shape(moment.shape(cell.layer)), device="meta")
            parcels.append(Parcel(inverse, cell.owner, moment.symmetric))
            sources.append(cell.holders[key])
        self.world.send(parcels, sources, "inverses")
