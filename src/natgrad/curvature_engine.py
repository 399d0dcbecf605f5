"""All layers over all ranks: what is measured next, and how measurements become inverses at their owners.

One refresh:  sums on every rank -> one small sum of counts (how many samples everyone saw) -> moments to their holders
(triangles) -> holders average and decide when to measure again -> one small sum tells all ranks the intervals ->
holders invert. Where a layer is split over ranks, its holders first tell each other the traces (one small sum), by
which the damping is divided, and then send the inverses to the layer's owner. With nothing stale nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from natgrad.averages import Fresh, absorb
from natgrad.budget import Purse, Spending
from natgrad.capture import LOGITS, Capture, Key, LayerSeen, Measured, Watch
from natgrad.curvature.per_sample import Sample
from natgrad.hooks import LogitGradientScaling
from natgrad.inversion import Inversion
from natgrad.layer_state import DORMANT, LayerState
from natgrad.layers.registry import batch_first_of
from natgrad.parallel import OwnedTensor, World
from natgrad.readings import Readings, is_finite, together
from natgrad.refresh import NextInterval
from natgrad.sample_rows import bring_rows
from natgrad.sampling import Sampler
from natgrad.stacks import Storage

SEEN_BY_STEP, SEEN_BY_LAYER = 4, 9  # numbers in the sum by which ranks tell each other what they saw
ELSEWHERE = (
    "its module's calls do not account for its gradient: the weight is changed before its use, used elsewhere too "
    "(a penalty in the loss is weight_decay= here), its module computes more than its kind of layer does, or a hook "
    "changes its gradient"
)
TWICE = "the loss holds derivatives of the network, so a second backward pass goes through the first (double backward)"
NOT_FINITE = "its statistics are not finite (an overflow, or values that are not finite in the passes)"
ONCE = (
    "it is called once for the whole batch (with places, or one row where there are many samples), so gradients of "
    "single samples are not seen"
)
MISSED = "a backward pass went through it and did not reach its weight"
GROWN = "its calls in one forward pass see ever more samples, which only samples=None can add up"


def time_first(model: nn.Module) -> list[str]:
    """Modules that say they have samples in the second dimension of their inputs, and not what is inside of them."""
    found = [name for name, module in model.named_modules() if batch_first_of(module) is False]
    return [name for name in found if name and not any(name.startswith(f"{other}.") for other in found)]


def shortened(names: Sequence[str], most: int = 3) -> str:
    """Names, the first few of them."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class SeenByRanks(NamedTuple):
    """What all ranks saw in one step, added up."""

    samples: float
    predictions: float
    by: str
    last: int | None  # the layer whose places were taken for predictions
    weights: dict[Key, float]
    layers: dict[int, list[float]]  # the numbers of each layer's LayerSeen (capture.py), added up
    blocks: dict[Key, Tensor]  # how many rows each block has seen [b], where they differ

    def saw(self, key: Key) -> bool:
        """Whether any rank has measured a statistic."""
        return self.weights[key] > 0 and self.called[key[0]]

    @property
    def astray(self) -> dict[int, str]:
        """Layers whose gradient the hooks do not account for, and why."""
        return {k: TWICE if row[3] else ELSEWHERE for k, row in self.layers.items() if row[2]}

    @property
    def called(self) -> dict[int, bool]:
        """Whether a backward pass has reached a call of each layer."""
        return {k: row[0] > 0 for k, row in self.layers.items()}


class Taken(NamedTuple):
    """Measurements of one step that were taken in, until it is known when to measure again."""

    step: int
    plan: Sequence[Key]
    keys: Sequence[Key]
    unusable: Mapping[int, str]
    intervals: Callable[[], list[NextInterval]]


class Step(NamedTuple):
    """What `refresh` found out about a step."""

    unseen: dict[int, bool]  # cells that were watched but have nothing measured, and whether they were called
    astray: dict[int, str]  # cells whose gradient is not what their module's calls account for, and why


@dataclass(frozen=True)
class Assumed:
    """What was assumed about the last step that measured, over all ranks.

    samples: of the step. predictions: how many of a sample the loss is a mean of. by: who says so: the rows of the
    model's output or of a layer's output that have a gradient, or the user.
    """

    samples: int
    predictions: float
    by: str

    def __str__(self) -> str:
        return f"{self.samples} samples, the loss a mean over {self.predictions:g} predictions of each ({self.by})"


class Clocks(NamedTuple):
    """What the clocks of all layers say: the next step in which something is due; which are measured, which asleep."""

    stamp: int
    cells: list[LayerState]
    due: int
    ready: list[bool]
    asleep: list[bool]


class CurvatureEngine:
    """The cells of a model with the hooks that feed them.

    dims: the dimension of the samples in the inputs of each cell's layer. sharded: ranks hold parts of the parameters.
    """

    def __init__(
        self,
        cells: Sequence[LayerState],
        world: World,
        seed: int,
        sampled: bool = False,
        model: nn.Module | None = None,
        predictions: float | None = None,
        purse: Purse | None = None,
        sharded: bool = False,
    ):
        self.sharded = sharded
        self.purse = purse  # of what a step may spend, where it has a limit
        self.spending: Spending | None = None
        self.storage: Storage | None = None  # of the cells' tensors
        self._taken: Taken | None = None
        self._work: Inversion | None = None
        self._clocks: Clocks | None = None
        self._settled: tuple[int, tuple[float, ...]] | None = None  # clocks and dampings of a step without inversions
        self.local = False  # every rank takes its own rows
        self.judged: LogitGradientScaling | None = None  # rows are weighed by the gradients of the logits
        self.sampled = sampled  # curvature of labels drawn from the model, not of the data's
        self.half: tuple[float, int] | None = None  # of the last step: the square of its first passes, their samples
        self.model, self.predictions = model, predictions
        self.seed, self.world = seed, world
        self.clock: Callable[[], float] = perf_counter
        self.replace(cells)
        self.seconds: dict[str, float] = {}
        self.retries = 0  # factorisations that needed more damping
        self.mended: dict[str, int] = {}  # by layer: refreshes in which something could not be inverted at once
        self.dropped = 0  # statistics that could not be used
        self.share = 0.0  # of the statistics, measured in the last step
        self.samples = 0  # in the last step that measured, on all ranks
        self.assumed: Assumed | None = None
        self.drops: dict[str, tuple[int, str]] = {}  # by layer: measurements in a row that could not be used, and why
        self._doubts: list[str] = []
        self.time_first = () if model is None else time_first(model)

    def replace(self, cells: Sequence[LayerState], origins: Sequence[int] | None = None) -> None:
        """Take these cells from now on, unwatched until `arm`. `origins`: which of the cells before they are."""
        places = {} if origins is None else {old: new for new, old in enumerate(origins)}
        if hasattr(self, "capture"):
            self.capture.disarm()
        self.whole: set[int] = {places[k] for k in getattr(self, "whole", ()) if k in places}
        self._fresh: dict[int, set[str]] = {places[k]: v for k, v in getattr(self, "_fresh", {}).items() if k in places}
        self.cells = list(cells)
        if self.spending is not None:
            self.spending.replace(self.cells)
        elif self.purse is not None:
            self.spending = Spending(self.cells, self.world, self.purse)
        dims = [cell.dim for cell in cells]
        self.capture = Capture([cell.layer for cell in cells], self.model, dims, self.seed, self.sharded)
        self.capture.clock = self.clock
        self.capture.edges = [] if self.sampled else None
        self.capture.judged = self.judged
        # several ranks have shares of their own to compare
        self.capture.halves = self.world.size == 1 and not self.sharded
        self._plan: list[Key] = []

    def stored_anew(self) -> None:
        """The layers' state lies elsewhere now, in the middle of a step: what was measured of them is kept."""
        self.cells = list(self.cells)
        self._settled = None

    def count_with(self, clock: Callable[[], float]) -> None:
        """Count stages and hooks with this clock from now on: operations, for one, instead of seconds."""
        self.clock = self.capture.clock = clock

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds spent inside to `stage`."""
        start = self.clock()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + self.clock() - start

    @property
    def clocks(self) -> Clocks:
        """What all clocks say together."""
        assert self.storage is not None
        stamp = self.storage.clocks_stamp
        if self._clocks is None or self._clocks.stamp != stamp or self._clocks.cells is not self.cells:
            times = [[cell.clock(key) for key in cell.keys] for cell in self.cells]
            self._clocks = Clocks(
                stamp,
                self.cells,
                min((clock[0] for own in times for clock in own), default=DORMANT),
                [all(clock[3] > 0 for clock in own) for own in times],
                [any(clock[0] >= DORMANT for clock in own) for own in times],
            )
        return self._clocks

    def arm(self, step: int) -> None:
        """Attach hooks for the coming step `step` if anything is due in it, remove them otherwise."""
        due = {k: own for k, c in enumerate(self.cells) if (own := c.due(step))} if self.clocks.due <= step else {}
        if self.spending is not None:
            due = self.spending.measure(step, due)
        watches = {k: Watch(self.cells[k].layer, own) for k, own in due.items()}
        self._plan = [(k, moment.key) for k, watch in watches.items() for moment in watch.moments]
        if watches:
            self.capture.arm(watches, Sampler(self.seed, step, self.world.rank, 1 / self.world.size))
        else:
            self.capture.disarm()

    def settle(self, readings: Readings) -> None:
        """The passes of a step have ended: ask for the numbers that `refresh` decides by."""
        if self._plan:
            self.capture.settle(readings)

    def refresh(self, step: int, scale: float, reduction: str, active: int, readings: Readings) -> Step:
        """Take in what this step's passes measured, `conclude` follows. Nothing is taken of layers that went astray.

        scale: the factor by which the loss was multiplied for mixed precision. active: ranks that have a batch. The
        step's loss is the mean of theirs.
        """
        self.whole.clear()
        self.half = None
        plan, self.share = self._plan, 0.0
        if not plan:
            return Step({}, {})
        self.share = len(plan) / sum(len(c.statistics) for c in self.cells)
        measured = self.capture.collect()
        self.seconds |= {"measure": self.capture.seconds, "checksum": self.capture.checking}
        self.half = measured.half
        with self.timed("messages"):
            found = self._exchange(plan, measured)
            samples = found.samples
            self.samples = round(samples)
            if self.sampled and not samples:
                raise ValueError('fisher="sampled": call sample(output) before backward(), so that labels can be drawn')
            unusable = self._unusable(found)
            seen = [key for key in plan if found.saw(key) and key[0] not in unusable]
            moments = [key for key in seen if not self.cells[key[0]].by_rows]
            means = self._means(found, reduction)
            parcels = self._parcels(moments, measured, found, scale, reduction, active, means)
            received = self.world.reduce_narrow(parcels, "statistics")
            stacks = [key for key in seen if self.cells[key[0]].by_rows]
            share = measured.samples if self.local else samples / active  # of the samples, if all had equally many
            weigh = (share if reduction == "mean" else 1) / scale
            wider = 1.0 if self.judged is not None else means**0.5  # judged rows have no scale of their own
            rows = bring_rows(self.cells, self.world, stacks, measured, weigh, wider, self.local)
        with self.timed("factor"):
            for index, key in (*moments, *stacks):
                self.cells[index].arrive(key, step)
            taken = self._absorb(moments, received, round(samples), round(samples * max(means, 1.0)), readings)
            stacked = self._stack(stacks, rows, found, step, readings)
        self._fresh = {}
        for index, key in (*moments, *stacks):
            self._fresh.setdefault(index, set()).add(key)
        lost = {index for index, why in unusable.items() if not found.astray.get(index)}
        for index, key in plan:
            if index in lost:
                self._advance(index, key, step, 0)
        self._taken = Taken(step, plan, [*moments, *stacks], unusable, lambda: [*taken(), *stacked()])
        self._doubts = self._doubt(found, measured, scale, reduction)
        nothing = {index for index, key in plan if not found.saw((index, key))}
        return Step({index: found.called[index] for index in sorted(nothing)}, found.astray)

    @contextmanager
    def whole_step(self) -> Iterator[None]:
        """If a step ends with an error inside, nothing is left of it for `conclude`."""
        try:
            yield
        except BaseException:
            self._taken = self._work = None
            raise

    @property
    def unfinished(self) -> bool:
        """Whether `conclude` has something to do in this step, the same on every rank."""
        return self._taken is not None or self._work is not None

    def conclude(self) -> None:
        """After a read: when to measure again, and inverses that are as they should be, at their owners."""
        work, self._work = self._work, None
        taken, self._taken = self._taken, None
        if taken is not None:
            with self.timed("messages"):
                numbers = torch.tensor([told.packed() for told in taken.intervals()], dtype=torch.int64)
                self.world.max([numbers], "scalars")
            told = dict(zip(taken.keys, map(NextInterval.unpacked, numbers.tolist())))
            found = {key: one.interval for key, one in told.items()}
            for (index, key), (interval, change) in told.items():
                self._advance(index, key, taken.step, interval)
                if self.spending is not None:
                    self.spending.changed(index, key, change)
                if not interval:
                    self._begin_anew(index)
            self._count_drops(taken.plan, taken.unusable, found)
        if work is not None:
            with self.timed("factor"):
                self.retries += work.mend()
            for name in work.troubled:
                self.mended[name] = self.mended.get(name, 0) + 1
            with self.timed("messages"):
                work.deliver()

    def _begin_anew(self, index: int) -> None:
        """What was measured of a layer was finite on every rank, and its sum is not: nothing of it is of use."""
        cell = self.cells[index]
        cell.forget()
        for key in cell.keys:
            cell.numbers[f"{key}_damping"] = 0.0
            if not cell.by_rows and cell.holders[key] == self.world.rank:
                cell.state()[key].zero_()

    def _exchange(self, plan: Sequence[Key], measured: Measured) -> SeenByRanks:
        """What all ranks saw, added up: one small sum."""
        layers = list(dict.fromkeys(index for index, _ in plan))
        own = [measured.samples, measured.predictions, float(measured.by == LOGITS), float(measured.by is not None)]
        # of rows, the samples of a rank that did not call the layer have gradients of zero
        idle = {key: measured.samples if self.cells[key[0]].by_rows else 0 for key in plan}
        own += [float(measured.weights.get(key, idle[key])) for key in plan]
        for index in layers:
            seen = measured.seen.get(index, LayerSeen())
            missed = seen.passes > 0 and (seen.swapped or not seen.agrees)
            own += [
                seen.calls,
                seen.passes,
                missed,
                missed and seen.twice,
                seen.samples,
                seen.once,
                seen.grown,
                seen.missed,
                not seen.finite,
            ]
        uneven = [(index, key) for index, key in plan if self._by_block(index, key)]
        for key in uneven:
            rows_of = measured.blocks.get(key)
            own += [0.0] * self.cells[key[0]].layer.shape.blocks if rows_of is None else rows_of.tolist()
        if self.spending is not None:
            own += self.spending.count(plan, measured)
        numbers = torch.tensor(own, dtype=torch.float64)
        self.world.sum([numbers], "scalars")
        samples, predictions, of_output, of_any, *rest = numbers.tolist()  # SEEN_BY_STEP
        weights = dict(zip(plan, rest))
        begin, end = len(plan), len(plan) + SEEN_BY_LAYER * len(layers)
        rows, counted = torch.tensor(rest[begin:end]).view(-1, SEEN_BY_LAYER).tolist(), rest[end:]
        blocks: dict[Key, Tensor] = {}
        for key in uneven:
            count = self.cells[key[0]].layer.shape.blocks
            blocks[key], counted = torch.tensor(counted[:count]), counted[count:]
        if self.spending is not None:
            self.spending.take_in(plan, counted, samples)
        last = None if measured.by in (None, LOGITS) else measured.by
        by = "rows of the model's output with a gradient" if of_output >= of_any / 2 and of_any else ""
        if not by and last is not None:
            by = f"rows of the output of {self.cells[last].name or 'the model'} with a gradient"
        told = by or "no gradient was seen"
        return SeenByRanks(samples, predictions, told, last, weights, dict(zip(layers, rows)), blocks)

    def _by_block(self, index: int, key: str) -> bool:
        """Whether a statistic is a mean over rows that are not the same for all blocks of its layer."""
        cell = self.cells[index]
        moment = next(m for m in cell.statistics if m.key == key)
        return cell.layer.uneven and not cell.by_rows and moment.order == 0

    def _unusable(self, found: SeenByRanks) -> dict[int, str]:
        """The layers whose measurements say nothing about their curvature, and why."""
        unusable = dict(found.astray)
        for index, (_, _, _, _, _, once, grown, missed, infinite) in found.layers.items():
            for happened, why in ((missed, MISSED), (once, ONCE), (grown, GROWN), (infinite, NOT_FINITE)):
                if happened:
                    unusable.setdefault(index, why)
        return unusable

    def _count_drops(self, plan: Sequence[Key], unusable: Mapping[int, str], intervals: Mapping[Key, int]) -> None:
        """How often in a row each layer's measurements could not be used."""
        for index in dict.fromkeys(index for index, _ in plan):
            name = self.cells[index].name
            own = [interval for (k, _), interval in intervals.items() if k == index]
            why = unusable.get(index) or ("" if all(own) else NOT_FINITE)
            if why:
                self.drops[name] = self.drops.get(name, (0, ""))[0] + 1, why
            elif own:
                self.drops.pop(name, None)

    def _doubt(self, found: SeenByRanks, measured: Measured, scale: float, reduction: str) -> list[str]:
        told, n = [], found.samples
        unlike: dict[float, list[str]] = {}
        for index, (_, _, _, _, samples, once, *_) in found.layers.items():
            if samples not in (0, n) and not once and self.cells[index].layer.per_sample:
                unlike.setdefault(samples, []).append(self.cells[index].name or "the model")
        if unlike:
            which = "; ".join(f"{int(m)} in {shortened(names)}" for m, names in sorted(unlike.items()))
            told.append(
                f"layers disagree about the samples of a step: {int(n)} in most, {which}. The first dimension of their "
                "inputs is taken for samples, and their curvature counts as a part or a multiple of the step's. "
                "batch_dim= says where samples are"
            )
        last = None if found.last is None else self.cells[found.last]
        if last is not None and last.layer.free is None and self.predictions is None and found.predictions > n:
            told.append(
                f"the loss: {last.name or 'the model'} is the layer nearest to it, so it is taken for a mean over "
                f"{found.predictions / max(n, 1):g} places of each sample. If a head outside of the model makes one "
                "prediction of each, pass predictions=1"
            )
        if 0 < found.predictions < n and self.predictions is None and not self.sampled:
            told.append(
                f"some samples: {int(n - found.predictions)} of {int(n)} have no gradient, and the loss is taken for a "
                "mean over the others, as with ignore_index. If it is a mean over all (a hinge, a clipped ratio), set "
                "predictions=1"
            )
        if measured.uneven is not None and not self.sampled and reduction == "mean":
            least, most = measured.uneven
            told.append(
                f"means of means: forward passes with {least:g} to {most:g} predictions have losses that are means of "
                "their own, so those of the shortest weigh most. Curvature takes all predictions of a step to weigh "
                "alike: divide each pass's summed loss by the predictions of the whole step"
            )
        if self.time_first and any(measured.seen[k].deep for k in found.layers if k in measured.seen):
            told.append(
                f"time first: {shortened(self.time_first)} with batch_first=False have samples in the second "
                "dimension, and layers outside of them are taken to have them in the first. batch_dim= says where they "
                "are"
            )
        if any(seen.again for seen in measured.seen.values()):
            told.append(
                "layers outside: layers were called several times outside of the model's own forward pass before a "
                "backward pass, and are taken for calls on the same samples. Calls of the model itself are parts of a "
                "larger batch"
            )
        steep = measured.steepness / scale
        judged = reduction == "mean" and not self.sampled and measured.predictions >= 16
        if judged and steep * measured.predictions > 2 * measured.predictions**0.5:
            told.append(
                "the loss looks like a sum over samples, not a mean (or a mean times a large constant): the gradients "
                'of the logits do not fall with their number. Pass reduction="sum" if it is a sum, or divide it'
            )
        return told

    def doubts(self) -> list[str]:
        """What in the last step that measured may be other than was assumed, a line each."""
        told, self._doubts = self._doubts, []
        return told

    def _absorb(
        self,
        keys: Sequence[Key],
        received: Sequence[Tensor | None],
        samples: int,
        predictions: int,
        readings: Readings,
    ) -> Callable[[], list[NextInterval]]:
        """Take in what this rank holds. Returns what gives, after a read, when [keys] are due: 0 for what others hold
        or was unusable.
        """
        mine, found = [], []
        for k, ((index, key), value) in enumerate(zip(keys, received)):
            if value is not None:
                cell = self.cells[index]
                moment = next(m for m in cell.statistics if m.key == key)
                found.append(Fresh(cell, key, value, moment.effective_samples(cell.layer, samples, predictions)))
                mine.append(k)
        told = absorb(found, readings)

        def intervals() -> list[NextInterval]:
            own = dict(zip(mine, told()))
            return [own.get(k, NextInterval(0)) for k in range(len(keys))]

        return intervals

    def _stack(
        self, keys: Sequence[Key], rows: Mapping[Key, Sample], found: SeenByRanks, step: int, readings: Readings
    ) -> Callable[[], list[NextInterval]]:
        """`_absorb` for rows."""
        intervals, grams = [0] * len(keys), dict[int, Tensor]()
        for k, key in enumerate(keys):
            if key in rows:
                seed = Sampler(self.seed, step, 0, 1.0).mix(key[0])
                share = 1.0 if self.local else found.weights[key] / max(found.samples, 1)
                grams[k], intervals[k] = self.cells[key[0]].keep_rows(key[1], rows[key], share, seed)
                if len(rows[key]["mean"]) == round(found.weights[key]):
                    self.whole.add(key[0])

        def hear(sizes: Tensor) -> None:
            for (k, gram), size in zip(grams.items(), sizes.tolist()):
                intervals[k] = intervals[k] if is_finite(size, gram) else 0

        if grams:
            readings.ask(together(torch._foreach_norm(list(grams.values()))), hear)
        return lambda: [NextInterval(interval) for interval in intervals]

    def _means(self, found: SeenByRanks, reduction: str) -> float:
        """How many predictions a sample's loss is the mean of.

        The gradients of a mean over p predictions are p times smaller than those of a sum, and the curvature of the
        loss is p times as large as their squares say.
        """
        means, by = found.predictions / max(found.samples, 1), found.by
        if reduction == "sum" and not self.sampled:
            means, by = 1.0, 'reduction="sum"'
        elif self.sampled and self.predictions is None:
            by = "as many as labels were drawn"
        elif self.predictions is not None:
            means, by = float(self.predictions), "as predictions= says"
        self.assumed = Assumed(self.samples, means, by)
        return means if means > 0 else 1.0

    def _parcels(
        self,
        keys: Sequence[Key],
        measured: Measured,
        found: SeenByRanks,
        scale: float,
        reduction: str,
        active: int,
        means: float,
    ) -> list[OwnedTensor]:
        """A rank's shares of means over all ranks' samples.

        A sample's gradient in the mean of R losses is 1/R of what its rank sees, and 1/N of that of its own loss, so
        the mean of N squares is N / R^2 times the sum of what ranks see, however many samples each has.
        """
        if reduction == "mean":
            weigh = found.samples / active / active * means
        else:
            weigh = means / found.samples
        if self.sampled:  # our own loss, a sum over predictions, unscaled
            weigh, scale = 1 / (found.samples * means), 1.0
        moments, values, factors = [], [], []
        for key in keys:
            cell = self.cells[key[0]]
            moment = next(m for m in cell.statistics if m.key == key[1])
            value = measured.sums.get(key)
            moments.append(moment)
            values.append(cell.zeros(moment.shape(cell.layer)) if value is None else value)
            factors.append(1 / found.weights[key] if moment.order == 0 else weigh / scale**2)
        if values:
            torch._foreach_mul_(values, factors)  # sums of this step, which nobody else has
        for value, key in zip(values, keys):
            if key in found.blocks:  # a mean over the rows of each block
                share = found.weights[key] / found.blocks[key].clamp_min(1)
                value.mul_(share.to(value).view(-1, *[1] * (value.dim() - 1)))
        return [
            OwnedTensor(value, self.cells[index].holders[name], moment.symmetric)
            for value, (index, name), moment in zip(values, keys, moments)
        ]

    def _advance(self, index: int, key: str, step: int, interval: int) -> None:
        self.dropped += interval == 0  # the statistic was not finite
        self.cells[index].advance(key, step, interval)

    def factor(self, dampings: Sequence[float], readings: Readings) -> None:
        """Invert, at their holders, what is fresh or was damped otherwise; `conclude` follows.

        Under a budget some of it waits for later steps.
        """
        fresh, self._fresh = self._fresh, {}
        now, jobs = (self.clocks.stamp, tuple(dampings)), []
        if fresh or self._settled != now:
            jobs = [
                (index, key)
                for index, (cell, damping) in enumerate(zip(self.cells, dampings))
                for key in cell.outdated(damping, fresh.get(index, set()))
            ]
            self._settled = None if jobs else now
        if self.spending is not None:
            jobs = self.spending.invert(jobs)
        if jobs:
            assert self.storage is not None
            self._work = Inversion(self.cells, self.storage, self.world, jobs, dampings)
            with self.timed("messages"):
                self._work.divide()
            with self.timed("factor"):
                self._work.invert(readings)

    def sleep(self, index: int) -> None:
        """Do not watch a layer that is not in use."""
        for moment in self.cells[index].statistics:
            _, *rest = self.cells[index].clock(moment.key)
            self.cells[index].set_clock(moment.key, [DORMANT, *rest])

    def wait(self, index: int, step: int) -> None:
        """Try again after the present interval: this time there was nothing to measure."""
        for moment in self.cells[index].statistics:
            _, interval, *rest = self.cells[index].clock(moment.key)
            self.cells[index].set_clock(moment.key, [step + interval, interval, *rest])

    def wake(self, index: int) -> None:
        """Watch a layer again from the next step on, at once and whatever it takes."""
        for moment in self.cells[index].statistics:
            _, *rest = self.cells[index].clock(moment.key)
            self.cells[index].set_clock(moment.key, [0, *rest])
