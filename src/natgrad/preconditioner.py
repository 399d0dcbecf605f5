"""All layers over all ranks: what is measured next, and how measurements become inverses at their owners.

One refresh:  sums on every rank -> one small sum of counts (how many samples everyone saw) -> moments to their holders
(triangles) -> holders average and decide when to measure again -> one small sum tells all ranks the intervals ->
holders invert. Where a layer is split over ranks, its holders first tell each other the traces (one small sum), by
which the damping is divided, and then send the inverses to the layer's owner. With nothing stale nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter

import torch
from torch import Tensor, nn

from natgrad.capture import Capture, Key, Measured, Sampler, Watch
from natgrad.cell import DORMANT, Cell
from natgrad.curvature.rows import Sample
from natgrad.gathering import bring_rows
from natgrad.hooks import Judge
from natgrad.inversion import Inversion
from natgrad.parallel import Parcel, World


class Preconditioner:
    """The cells of a model with the hooks that feed them."""

    def __init__(
        self,
        cells: Sequence[Cell],
        world: World,
        seed: int,
        sampled: bool = False,
        model: nn.Module | None = None,
        predictions: float | None = None,
    ):
        self.local = False  # every rank takes its own rows
        self.judged: Judge | None = None  # rows are weighed by the gradients of the logits
        self.sampled = sampled  # curvature of labels drawn from the model, not of the data's
        self.model, self.predictions = model, predictions
        self.replace(cells)
        self.world = world
        self.seed = seed
        self.seconds: dict[str, float] = {}
        self.retries = 0  # factorisations that needed more damping
        self.dropped = 0  # statistics that were not finite
        self.share = 0.0  # of the statistics, measured in the last step
        self.samples = 0  # in the last step that measured, on all ranks

    def replace(self, cells: Sequence[Cell]) -> None:
        """Take these cells from now on, unwatched until `arm`."""
        if hasattr(self, "capture"):
            self.capture.disarm()
        self.cells = list(cells)
        self.capture = Capture([cell.layer for cell in cells], self.model)
        self.capture.edges = [] if self.sampled else None
        self.capture.judged = self.judged
        self._plan: list[Key] = []
        self.whole: set[int] = set()  # cells whose rows are of all samples of this very step
        self._fresh: dict[int, set[str]] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds spent inside to `stage`."""
        start = perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + perf_counter() - start

    def arm(self, step: int) -> None:
        """Attach hooks for the coming step `step` if anything is due in it, remove them otherwise."""
        watches = {k: Watch(c.layer, due) for k, c in enumerate(self.cells) if (due := c.due(step))}
        self._plan = [(k, moment.key) for k, watch in watches.items() for moment in watch.moments]
        if watches:
            self.capture.arm(watches, Sampler(self.seed, step, self.world.rank, 1 / self.world.size))
        else:
            self.capture.disarm()

    def refresh(self, step: int, scale: float, reduction: str) -> set[int]:
        """Take in what this step's passes measured. Returns the cells that were watched but never called.

        `scale` is the factor by which the loss was multiplied for mixed precision.
        """
        self.whole.clear()
        plan, total = self._plan, sum(len(c.curvature.statistics) for c in self.cells)
        self.share = len(plan) / max(total, 1)
        if not plan:
            return set()
        self.seconds["measure"] = self.capture.seconds
        measured = self.capture.collect()
        with self.timed("messages"):
            seen_here = (float(measured.weights.get(key, 0) > 0) for key in plan)
            counts = torch.tensor([measured.samples, measured.predictions, *seen_here], dtype=torch.float64)
            self.world.sum([counts], "scalars")
            samples, predictions, *ranks = counts.tolist()
            self.samples = round(samples)
            if self.sampled and not samples:
                raise ValueError('fisher="sampled": call sample(output) before backward(), so that labels can be drawn')
            seen = [(key, n) for key, n in zip(plan, ranks) if n > 0]
            moments = [(key, n) for key, n in seen if not self.cells[key[0]].by_rows]
            means = self._means(samples, predictions, reduction)
            parcels = [self._parcel(key, measured, n, scale, reduction, means) for key, n in moments]
            received = self.world.reduce_narrow(parcels, "statistics")
            stacks = [(key, n) for key, n in seen if self.cells[key[0]].by_rows]
            weigh = (measured.samples if reduction == "mean" else 1) / scale
            wider = 1.0 if self.judged is not None else means**0.5  # judged rows have no scale of their own
            rows = bring_rows(self.cells, self.world, [key for key, _ in stacks], measured, weigh, wider, self.local)
        with self.timed("factor"):
            seen = [*moments, *stacks]
            taken = self._absorb([key for key, _ in moments], received, round(samples))
            intervals = torch.cat([taken, self._stack([key for key, _ in stacks], rows, round(samples), step)])
        with self.timed("messages"):
            self.world.max([intervals], "scalars")
        self._fresh = {}
        for ((index, key), _), interval in zip(seen, intervals.tolist()):
            self._advance(index, key, step, interval)
            if interval:
                self._fresh.setdefault(index, set()).add(key)
        return {index for (index, _), n in zip(plan, ranks) if n == 0}

    def _absorb(self, keys: Sequence[Key], received: Sequence[Tensor | None], samples: int) -> Tensor:
        """Take in what this rank holds. Returns everyone's intervals [keys], 0 for what others hold or was unusable."""
        intervals = torch.zeros(len(keys), dtype=torch.int64)
        mine = [k for k, value in enumerate(received) if value is not None]
        looks = [self.cells[keys[k][0]].look(keys[k][1], value) for k in mine if (value := received[k]) is not None]
        if not looks:
            return intervals
        numbers = torch.cat([known for _, known in looks]).tolist()  # the one time that the host waits
        for k, (fresh, known) in zip(mine, looks):
            index, key = keys[k]
            cell = self.cells[index]
            moment = next(m for m in cell.curvature.statistics if m.key == key)
            worth = moment.behind(cell.layer, samples)
            intervals[k] = cell.keep(key, fresh, numbers[: len(known)], worth)
            del numbers[: len(known)]
        return intervals

    def _stack(self, keys: Sequence[Key], rows: Mapping[Key, Sample], samples: int, step: int) -> Tensor:
        """`_absorb` for rows."""
        intervals = torch.zeros(len(keys), dtype=torch.int64)
        for k, key in enumerate(keys):
            if key in rows:
                seed = Sampler(self.seed, step, 0, 1.0).mix(key[0])
                intervals[k] = self.cells[key[0]].keep_rows(key[1], rows[key], seed)
                if len(rows[key]["mean"]) == samples:
                    self.whole.add(key[0])
        return intervals

    def _means(self, samples: float, predictions: float, reduction: str) -> float:
        """How many predictions a sample's loss is the mean of: by so much less do its gradients' squares add up to."""
        if reduction == "sum" and not self.sampled:
            return 1.0
        return self.predictions if self.predictions is not None else predictions / max(samples, 1)

    def _parcel(self, key: Key, measured: Measured, ranks: float, scale: float, reduction: str, means: float) -> Parcel:
        """A rank's share of a mean over all ranks' samples."""
        cell = self.cells[key[0]]
        moment = next(m for m in cell.curvature.statistics if m.key == key[1])
        value = measured.sums.get(key)
        if value is None:
            value = cell.zeros(moment.shape(cell.layer))
        elif moment.order == 0:
            value = value / (measured.weights[key] * ranks)
        else:
            if self.sampled:
                reduction, scale = "sum", 1.0  # our own loss, unscaled
            weigh = measured.samples if reduction == "mean" else 1 / measured.samples
            value = value * (weigh * means / (self.world.size * scale**2))
        return Parcel(value, cell.holders[key[1]], moment.symmetric)

    def _advance(self, index: int, key: str, step: int, interval: int) -> None:
        cell = self.cells[index]
        _, current, previous, refreshes = cell.clock(key)
        if interval == 0:  # the statistic was not finite: keep the old one, measure again at once
            self.dropped += 1
            cell.set_clock(key, [step + 1, current, previous, refreshes])
        else:
            cell.set_clock(key, [step + interval, interval, current, refreshes + 1])

    def factor(self, dampings: Sequence[float]) -> None:
        """Invert, at their holders, what is fresh or was damped otherwise, and bring it to the owners."""
        fresh, self._fresh = self._fresh, {}
        jobs = [
            (index, key)
            for index, (cell, damping) in enumerate(zip(self.cells, dampings))
            for key in cell.outdated(damping, fresh.get(index, set()))
        ]
        if jobs:
            work = Inversion(self.cells, self.world, jobs, dampings)
            with self.timed("messages"):
                work.divide()
            with self.timed("factor"):
                self.retries += work.invert()
            with self.timed("messages"):
                work.deliver()

    def sleep(self, index: int) -> None:
        """Do not watch a layer that is not in use."""
        for moment in self.cells[index].curvature.statistics:
            _, *rest = self.cells[index].clock(moment.key)
            self.cells[index].set_clock(moment.key, [DORMANT, *rest])

    def wait(self, index: int, step: int) -> None:
        """Try again after the present interval: this time there was nothing to measure."""
        for moment in self.cells[index].curvature.statistics:
            _, interval, *rest = self.cells[index].clock(moment.key)
            self.cells[index].set_clock(moment.key, [step + interval, interval, *rest])

    def wake(self, index: int, step: int) -> None:
        """Watch a layer again from `step` on."""
        for moment in self.cells[index].curvature.statistics:
            _, *rest = self.cells[index].clock(moment.key)
            self.cells[index].set_clock(moment.key, [step, *rest])
