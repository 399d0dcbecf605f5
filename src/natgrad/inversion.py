"""From statistics to damped inverses, over all layers and ranks, in four moves.

divide    how much damping each statistic gets; holders of one layer on several ranks sum up their traces (a small sum)
invert    every holder inverts what it holds, statistics of one size in one call
mend      where that did not succeed, as the host knows after a read, once more with more damping
deliver   inverses made elsewhere go to their layers' owners
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natgrad.curvature import Curvature
from natgrad.layer_state import LayerState
from natgrad.parallel import OwnedTensor, World
from natgrad.readings import Readings
from natgrad.stacks import Storage

Job = tuple[int, str]  # a cell's place and one of its statistics

TOGETHER = 2**24  # numbers that are inverted in one call: more would double the memory that a large layer needs


class Slab(NamedTuple):
    """Blocks in a row of one statistic that are to be inverted: those of `cells`, in a stack."""

    cells: tuple[int, ...]
    key: str
    statistic: Tensor
    damping: Tensor


Attempt = tuple[Curvature, Sequence[Slab]]  # statistics of one size that were inverted in one call


class Portion(NamedTuple):
    """Numbers [start, stop) of a vector."""

    whole: Tensor
    start: int
    stop: int


def joined(portions: Sequence[Portion]) -> Tensor:
    """Portions behind one another; neighbours in one vector are not copied."""
    first, last = portions[0], portions[-1]
    if all(b.whole is a.whole and b.start == a.stop for a, b in pairwise(portions)):
        return first.whole[first.start : last.stop]
    return torch.cat([one.whole[one.start : one.stop] for one in portions])


class Inversion:
    """The inversions of one step: `jobs`, the same on every rank, with each cell's damping."""

    def __init__(
        self,
        cells: Sequence[LayerState],
        storage: Storage,
        world: World,
        jobs: Sequence[Job],
        dampings: Sequence[float],
    ):
        self.cells, self.storage, self.world, self.dampings = cells, storage, world, dampings
        self.jobs = list(jobs)
        self.parts: dict[Job, Portion] = {}
        self.made: dict[Job, Tensor] = {}
        self._ready: list[tuple[int, int, str, Tensor]] = []  # inverses of neighbouring layers, to be written
        self._waiting = 0  # numbers of these

    def divide(self) -> None:
        """The damping [b] of every statistic that this rank holds, by the traces of all statistics of its layer."""
        traces: dict[Job, Tensor] = {}
        indices = list(dict.fromkeys(index for index, _ in self.jobs))
        for index in indices:
            cell = self.cells[index]
            for moment in cell.statistics if cell.split else ():
                held = cell.holders[moment.key] == self.world.rank
                shape = moment.shape(cell.layer)[:1]
                traces[index, moment.key] = cell.trace(moment.key) if held else cell.zeros(shape)
        self.world.sum(list(traces.values()), "scalars")
        alike: dict[Any, list[int]] = defaultdict(list)
        for index in indices:
            cell = self.cells[index]
            kinds = tuple((key, self._kind(index, key)) for key in self._held(cell))
            alike[cell.curvature, kinds, self.dampings[index], cell.split].append(index)
        for (curvature, _, damping, split), found in alike.items():
            some = sorted(found, key=self.storage.place_of)
            own: dict[str, Tensor] = {}
            counts: dict[str, list[int]] = {}
            for key in self.cells[some[0]].keys if split else self._held(self.cells[some[0]]):
                values = [traces[k, key] for k in some] if split else self._traces(some, key)
                own[key] = torch.cat(values) if len(values) > 1 else values[0]
                counts[key] = [len(v) for v in values] if split else [self._blocks(k, key) for k in some]
            if not own:
                continue
            for key, part in curvature.split(own, damping).items():
                ends = accumulate(counts[key], initial=0)
                self.parts |= {(k, key): Portion(part, *span) for k, span in zip(some, pairwise(ends))}

    def _held(self, cell: LayerState) -> list[str]:
        """The statistics of a layer that this rank holds."""
        return [key for key in cell.keys if cell.holders[key] == self.world.rank]

    def _kind(self, index: int, key: str) -> Any:
        value = self.cells[index].state()[key]
        return value.dtype, value.device

    def _blocks(self, index: int, key: str) -> int:
        return len(self.cells[index].state()[key])

    def _traces(self, indices: Sequence[int], key: str) -> list[Tensor]:
        """Mean eigenvalues of the blocks of these layers, in their order, one tensor for each run of neighbours."""
        return [self.cells[run[0]].mean_eigenvalue(key, self._joined(run, key)) for run in self._runs(indices, key)]

    def _runs(self, indices: Sequence[int], key: str) -> Iterator[list[int]]:
        """Layers whose blocks of a statistic lie behind one another, in the given order."""
        run: list[int] = []
        for index in indices:
            if run and not self.storage.follows(run[-1], index, key):
                yield run
                run = []
            run.append(index)
        if run:
            yield run

    def _joined(self, run: Sequence[int], key: str) -> Tensor:
        """The blocks of neighbours as one tensor, as they are kept, without a copy."""
        if self.cells[run[0]].by_rows:
            return self.cells[run[0]].state()[key]
        return self.storage.blocks_of(run[0], run[-1], key)

    def invert(self, readings: Readings) -> None:
        """Make the inverses that fall to this rank, and ask which of them can be used; `mend` follows after a read."""
        self.failed: list[Attempt] = []
        self.troubled: set[str] = set()  # layers of which something could not be inverted
        attempts = list[tuple[Tensor, Attempt]]()
        for curvature, slabs in self._batches():
            inverse, good = curvature.factor(slabs[0].key, *self._together(slabs))
            self._keep(slabs, inverse)
            if good is not None:
                attempts.append((good, (curvature, slabs)))
        self._write()
        for index, key in self.jobs:
            self.cells[index].numbers[f"{key}_damping"] = self.dampings[index]
        for device in dict.fromkeys(good.device for good, _ in attempts):
            self._ask([one for one in attempts if one[0].device == device], readings)

    def _ask(self, attempts: Sequence[tuple[Tensor, Attempt]], readings: Readings) -> None:
        """Ask which attempts on one device have succeeded with all of their blocks."""

        def hear(sound: Tensor) -> None:
            told = iter(sound.tolist())
            for good, attempt in attempts:
                found = list(islice(told, len(good)))
                if not all(found):
                    self.failed.append(attempt)
                    self.troubled |= self._behind(attempt[1], found)

        readings.ask(torch.cat([good for good, _ in attempts]), hear)

    def _behind(self, slabs: Sequence[Slab], found: Sequence[bool]) -> set[str]:
        """The layers of which some block was not inverted, by name."""
        owners = [k for slab in slabs for k in slab.cells for _ in range(self._blocks(k, slab.key))]
        return {self.cells[k].name for k, good in zip(owners, found) if not good}

    def mend(self) -> int:
        """Make again, with more damping, what could not be inverted. Returns how many retries that took."""
        retries = 0
        for curvature, slabs in self.failed:
            inverse, tries = curvature.mend(slabs[0].key, *self._together(slabs))
            self._keep(slabs, inverse)
            retries += tries
        self._write()
        return retries

    def _together(self, slabs: Sequence[Slab]) -> tuple[Tensor, Tensor]:
        """Statistics with all of their entries, blocks behind blocks, and their damping."""
        joined = torch.cat([s.statistic for s in slabs]) if len(slabs) > 1 else slabs[0].statistic
        damping = torch.cat([s.damping for s in slabs]) if len(slabs) > 1 else slabs[0].damping
        return self.cells[slabs[0].cells[0]].square(slabs[0].key, joined), damping

    def _keep(self, slabs: Sequence[Slab], inverse: Tensor) -> None:
        """Write inverses into the owners' state, and remember those that travel."""
        if self.cells[slabs[0].cells[0]].by_rows:  # these are kept as they are; LAPACK's lie column by column
            inverse = inverse.contiguous()
        for slab, part in zip(slabs, inverse.split([len(s.statistic) for s in slabs])):
            first, name = self.cells[slab.cells[0]], f"{slab.key}_inverse"
            if first.owner != self.world.rank:
                self.made[slab.cells[0], slab.key] = part
            elif first.by_rows:
                first.state()[name] = part  # those made together lie behind one another
            else:
                self._ready.append((slab.cells[0], slab.cells[-1], name, part))
        self._waiting += inverse.numel()
        if self._waiting > TOGETHER // 4:
            self._write()

    def _write(self) -> None:
        """Bring inverses into the owners' state, many in one call."""
        self.storage.write_squares(self._ready)
        self._ready, self._waiting = [], 0

    def _batches(self) -> Iterator[Attempt]:
        """Statistics of one size and one formula, as runs of neighbours."""
        alike: dict[Any, list[int]] = defaultdict(list)
        for index, key in self.jobs:
            cell = self.cells[index]
            if cell.holders[key] == self.world.rank:
                statistic, form = cell.state()[key], cell.forms.get(key)
                shape = statistic.shape[1:] if form is None else torch.Size((form.n, form.n))
                alike[cell.curvature, key, shape, statistic.dtype, statistic.device].append(index)
        for (curvature, key, shape, *_), indices in alike.items():
            most = max(1, TOGETHER // max(shape.numel(), 1))  # blocks
            slabs, count = list[Slab](), 0
            for run in self._runs(sorted(indices, key=self.storage.place_of), key):
                for part in self._cut(run, key, most):
                    statistic = self._joined(part, key)
                    if slabs and count + len(statistic) > most:
                        yield curvature, slabs
                        slabs, count = [], 0
                    slabs.append(Slab(tuple(part), key, statistic, joined([self.parts[k, key] for k in part])))
                    count += len(statistic)
            if slabs:
                yield curvature, slabs

    def _cut(self, run: Sequence[int], key: str, most: int) -> Iterator[list[int]]:
        """A run in pieces of at most `most` blocks, or of one layer."""
        part, count = list[int](), 0
        for index in run:
            own = self._blocks(index, key)
            if part and count + own > most:
                yield part
                part, count = [], 0
            part.append(index)
            count += own
        yield part

    def deliver(self) -> None:
        """Send inverses of layers that are split over ranks to their owners."""
        parcels, sources, received = [], [], list[tuple[int, str, Tensor]]()
        for index, key in self.jobs:
            cell = self.cells[index]
            if cell.holders[key] == cell.owner:
                continue
            moment = next(m for m in cell.statistics if m.key == key)
            mine = cell.owner == self.world.rank
            inverse = self.made.get((index, key))
            if inverse is None:  # to here, or neither from here nor to here
                shape = cell.curvature.inverse_shape(moment.shape(cell.layer))
                inverse = cell.zeros(shape, device=None if mine else "meta")
            if mine:
                received.append((index, f"{key}_inverse", inverse))
            parcels.append(OwnedTensor(inverse, cell.owner, moment.symmetric))
            sources.append(cell.holders[key])
        self.world.send(parcels, sources, "inverses")
        self.storage.write_squares([(index, index, name, inverse) for index, name, inverse in received])
