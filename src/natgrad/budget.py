"""Which of the statistics that are due a step measures and which it inverts, under a limit of work (staleness.Budget).

Everything is counted in operations (layers/op_cost.py), from numbers that all ranks share: what a sample's passes take,
what measuring a statistic takes on every rank, taking in and factoring at its holder, and how much it has changed. So
all ranks decide alike without a message, before the forward pass, and a run that was stopped decides as one that was
not.

    allowance   share of a step: of its forward and backward passes on one rank
    limit       allowance less the debt
    bill        measuring on every rank + taking in and factoring on the busiest one
    debt        what bills have exceeded allowances by, in steps; a number of the param_groups

A piece of work is measuring what is due of one layer, or factoring what is to be inverted of one layer; the two may be
in different steps. The factors of a layer divide its damping by pi (SP-NGD eq. 12), so they are inverted in one step:
an inverse of A by today's pi beside one of G by the pi of some steps ago has another damping than was asked for.

The order in a step: first the layers that were measured before and wait to be factored, then measurements, then, with
what is left, factors of what has just been measured. Measurements are taken by

    priority = change * (1 + steps put off)

with the relative change of the last measurement, held in [LEAST, 1]; the first that does not fit ends the list, so
none is overtaken for ever. What is larger than the whole allowance is done where there is no debt and nothing else has
been taken. So a bill is at most the allowance or one piece of work, and the sum of bills over any steps at most their
allowances and one piece of work.

Without limit, and not on the bill: the first measurement of a statistic, one after a layer was not in use, and their
factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from natgrad.capture import Measured, OutputForm
from natgrad.curvature.curvature import Extent, Statistic
from natgrad.layer_state import LayerState
from natgrad.layers.op_cost import OpCost, moved, price
from natgrad.parallel import World
from natgrad.refresh import Budget

LEAST = 1 / 8
"""The least priority of a change: where all wait, a statistic that stands still is measured an eighth as often as one
that has become another."""
OF_A_LAYER, OF_A_STATISTIC = 2, 3  # numbers that ranks tell each other when they have counted
KNOWN = 1000  # layers with forms of calls whose work is remembered

Due = dict[int, tuple[Statistic, ...]]


class Item(NamedTuple):
    """One piece of work: on every rank, and beside it at the holders of a layer's statistics."""

    cell: LayerState
    keys: tuple[str, ...]
    priority: float
    everyone: float
    own: Mapping[int, float]
    """By rank."""

    @property
    def jobs(self) -> set[tuple[LayerState, str]]:
        return {(self.cell, key) for key in self.keys}


class Bill:
    """What one step takes: the work of every rank, and that of the busiest holder."""

    def __init__(self) -> None:
        self.everyone, self.own = 0.0, dict[int, float]()
        self.fee = 0.0
        """Of the first measurement in a step, whatever is measured: a backward pass of drawn labels."""

    def add(self, item: Item) -> None:
        self.everyone += item.everyone
        for rank, work in item.own.items():
            self.own[rank] = self.own.get(rank, 0.0) + work

    def fits(self, item: Item, limit: float, alone: bool) -> bool:
        """Whether the bill stays within the limit with one more item. `alone`: the first item may be any."""
        if alone and not self.everyone and not self.own:
            return True
        busiest = max([*self.own.values(), *(self.own.get(rank, 0.0) + work for rank, work in item.own.items())])
        return self.everyone + item.everyone + busiest <= limit

    @property
    def total(self) -> float:
        return self.everyone + max(self.own.values(), default=0.0) + self.fee


class Purse:
    """The budget of an optimizer over time. The debt stands in its param_groups, so that it is in every checkpoint."""

    def __init__(self, budget: Budget, groups: Callable[[], Sequence[dict[str, Any]]], sampled: bool):
        self.share, self.groups, self.sampled = budget.share, groups, sampled
        self.spent = 0.0
        """In the last step, in steps."""

    @property
    def debt(self) -> float:
        """In steps."""
        return self.groups()[0].get("debt", 0.0)

    @property
    def samples(self) -> int:
        """Of a step, as they were last counted."""
        return self.groups()[0].get("batch", 0)

    def pay(self, spent: float) -> None:
        """A step has taken so much of its passes' work; its allowance pays for that and for debts."""
        self.spent, before = spent, self.debt
        debt = max(0.0, before + spent - self.share)
        if debt != before:
            for group in self.groups():
                group["debt"] = debt


class Spending:
    """The choices of a step, between `begin` and `invert`."""

    def __init__(self, cells: Sequence[LayerState], world: World, purse: Purse):
        self.cells, self.world, self.purse = cells, world, purse
        self._known: dict[tuple[LayerState, tuple[OutputForm, ...], int], list[float]] = {}
        self._begin(0)

    def replace(self, cells: Sequence[LayerState]) -> None:
        """Some layers have become others, between `measure` and `invert`."""
        self.cells = cells
        self._known.clear()

    def _begin(self, step: int) -> None:
        self.step, self.bill = step, Bill()
        samples = self.purse.samples / self.world.size
        passes = [cell.numbers["passes"] for cell in self.cells if cell.statistics and cell.numbers is not None]
        self.passes, inputs = (samples * sum(own[k] for own in passes) for k in range(OF_A_LAYER))
        self.fee = inputs if self.purse.sampled else 0.0
        debt = self.purse.debt
        self.limit = max(0.0, self.purse.share - debt) * self.passes
        self.alone = debt == 0
        self.exempt: set[tuple[LayerState, str]] = set()
        self.reserved: list[Item] = []

    # --- before the forward pass ---

    def measure(self, step: int, due: Due) -> Due:
        """What is measured in the coming step of what is due in it."""
        self._begin(step)
        waiting = [(c, k) for c in self.cells if c.ready for k in c.keys if c.spoilt(k)]
        plan = Bill()
        self.reserved = self._take(sorted(self._factors(waiting), key=first), plan)
        asked = [(self.cells[i], m.key) for i, own in due.items() for m in own]
        self.exempt = {job for job in asked if self._exempt(*job)}
        unfinished = {cell for cell, _ in waiting}  # measured, to be factored before they are measured again
        items = self._measuring(job for job in asked if job not in self.exempt and job[0] not in unfinished)
        taken = set(self.exempt)
        for item in sorted(items, key=first) if self.alone or not self.fee else ():
            if not plan.fits(item, self.limit, self.alone):
                break
            plan.add(item)
            self.bill.add(item)
            self.bill.fee = self.fee
            taken |= item.jobs
        chosen = {i: tuple(m for m in own if (self.cells[i], m.key) in taken) for i, own in due.items()}
        return {i: own for i, own in chosen.items() if own}

    def _exempt(self, cell: LayerState, key: str) -> bool:
        """Whether a statistic is measured whatever it takes, or nobody knows what it takes."""
        next_step, _, _, refreshes = cell.clock(key)
        return next_step <= 0 or refreshes == 0 or not any(cell.numbers[f"{key}_budget"][1:])

    def _measuring(self, jobs: Iterable[tuple[LayerState, str]]) -> list[Item]:
        """Measurements, by how long they wait and how much has changed."""
        items = []
        for cell, keys in by_layer(jobs).items():
            priority, everyone = 0.0, 0.0
            own: dict[int, float] = {}
            for key in keys:
                change, measuring, taking, factoring = cell.numbers[f"{key}_budget"]
                everyone += measuring
                # a factor is of no use with other rows, so these are factored at once
                own[cell.holders[key]] = own.get(cell.holders[key], 0.0) + taking + (factoring if cell.by_rows else 0.0)
                priority = max(priority, held(change) * (1 + cell.waited(key, self.step)))
            items.append(Item(cell, keys, priority, everyone, own))
        return items

    # --- when the statistics are there ---

    def invert(self, jobs: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
        """Which of these inverses are made in this step; others wait. The step is paid for."""
        wanted = {(self.cells[i], key): (i, key) for i, key in jobs}
        at_once = {job for job in wanted if job in self.exempt or job[0].by_rows or not job[0].inverted(job[1])}
        before = {item.cell for item in self.reserved}
        items = self._factors(job for job in wanted if job not in at_once)
        items.sort(key=lambda item: (item.cell not in before, first(item)))
        chosen = at_once.union(*(item.jobs for item in self._take(items, self.bill)))
        for cell, key in wanted.keys() - chosen:
            cell.spoil(key)
        if self.passes:
            self.purse.pay(self.bill.total / self.passes)
        self.bill, self.exempt, self.reserved = Bill(), set(), []
        return [wanted[job] for job in wanted if job in chosen]

    def _factors(self, jobs: Iterable[tuple[LayerState, str]]) -> list[Item]:
        """Inverses to be made, by the age of what they are of and how much has changed."""
        items = []
        for cell, keys in by_layer(jobs).items():
            priority, own = 0.0, dict[int, float]()
            for key in keys:
                change, _, _, factoring = cell.numbers[f"{key}_budget"]
                next_step, interval, *_ = cell.clock(key)
                own[cell.holders[key]] = own.get(cell.holders[key], 0.0) + factoring
                priority = max(priority, held(change) * (1 + max(0, self.step - (next_step - interval))))
            items.append(Item(cell, keys, priority, 0.0, own))
        return items

    def _take(self, items: Sequence[Item], bill: Bill) -> list[Item]:
        """Those that fit into a bill, which grows by them. Holders work side by side, so a later one may fit."""
        taken = []
        for item in items:
            if bill.fits(item, self.limit, self.alone):
                bill.add(item)
                taken.append(item)
        return taken

    # --- counting ---

    def count(self, plan: Sequence[tuple[int, str]], measured: Measured) -> list[float]:
        """What this rank has counted of what was measured, to be summed over ranks: for each layer its passes, for each
        statistic what it takes.
        """
        passes: list[float] = []
        works: list[float] = []
        for index in dict.fromkeys(index for index, _ in plan):
            cell, seen = self.cells[index], measured.seen.get(index)
            forms = tuple(() if seen is None else seen.forms)
            numbers = self._counted(cell, forms, measured.samples)
            passes += numbers[:OF_A_LAYER]
            own = {key: numbers[OF_A_LAYER + OF_A_STATISTIC * k :][:OF_A_STATISTIC] for k, key in enumerate(cell.keys)}
            works += [number for i, key in plan if i == index for number in own[key]]
        return passes + works

    def take_in(self, plan: Sequence[tuple[int, str]], total: Sequence[float], samples: float) -> None:
        """Keep the sums over all ranks of what `count` gave, where anything was counted."""
        layers = list(dict.fromkeys(index for index, _ in plan))
        numbers = iter(total)
        for index in layers:
            own = [next(numbers) / max(samples, 1) for _ in range(OF_A_LAYER)]
            if any(own):
                self.cells[index].numbers["passes"] = own
        for index in layers:
            cell = self.cells[index]
            for key in (key for i, key in plan if i == index):
                own = [next(numbers) / self.world.size for _ in range(OF_A_STATISTIC)]
                if any(own):
                    cell.numbers[f"{key}_budget"] = [cell.numbers[f"{key}_budget"][0], *own]

    def changed(self, index: int, key: str, change: float) -> None:
        """By how much the last measurement differs from the one before."""
        cell = self.cells[index]
        cell.numbers[f"{key}_budget"] = [change, *cell.numbers[f"{key}_budget"][1:]]

    def _counted(self, cell: LayerState, forms: tuple[OutputForm, ...], samples: int) -> list[float]:
        """`count` of one layer with all of its statistics, remembered: most steps look alike."""
        if (found := self._known.get((cell, forms, samples))) is None:
            if len(self._known) >= KNOWN:
                self._known.clear()
            found = self._known[cell, forms, samples] = counted(cell, forms, samples, self.world.size)
        return found


def by_layer(jobs: Iterable[tuple[LayerState, str]]) -> dict[LayerState, tuple[str, ...]]:
    """The statistics of each layer, in their order."""
    found: dict[LayerState, tuple[str, ...]] = {}
    for cell, key in jobs:
        found[cell] = (*found.get(cell, ()), key)
    return found


def held(change: float) -> float:
    """A change as a weight."""
    return min(max(change, LEAST), 1.0)


def first(item: Item) -> float:
    """Sorts the highest priority to the front; equal ones stay in the model's order."""
    return -item.priority


def counted(cell: LayerState, forms: Sequence[OutputForm], samples: int, ranks: int) -> list[float]:
    """What calls of a layer take on one of `ranks` ranks, of whose step they are: passes; of each statistic work."""
    passes, inputs = 0.0, 0.0
    measuring = dict.fromkeys(cell.keys, 0.0)
    rows = 0
    for form in forms:
        x, y = (torch.empty(size, device="meta") for size in (form.x, form.y))
        own = cell.layer.passes(x, y)
        back = 0.0 if form.first else price(own.inputs)
        passes += price(own.forward) + price(own.weights) + back
        inputs += back
        n, places = cell.layer.count(x)
        rows += n * places
        for key in cell.keys:
            measuring[key] += price(cell.curvature.measure_work(cell.layer, key, x, y, ranks))
    seen = Extent(samples * ranks, max(1, round(rows / max(samples, 1))))
    found = [passes, inputs]
    for key in cell.keys:
        found += [measuring[key], *(price(own) for own in holder_work(cell, key, seen))] if forms else [0.0] * 3
    return found


def holder_work(cell: LayerState, key: str, seen: Extent) -> tuple[tuple[OpCost, ...], tuple[OpCost, ...]]:
    """What a statistic takes at its holder: taking in (unpacking, comparing, copying), and factoring."""
    statistic = next(m for m in cell.statistics if m.key == key)
    factoring = () if cell.curvature.joint else cell.curvature.factor_work(cell.layer, key, seen)
    if cell.by_rows:
        return (), tuple(factoring)
    numbers = 1
    for side in statistic.shape(cell.layer):
        numbers *= side
    return (moved(numbers, 6 + 2 * cell.staleness().looks_back, calls=20),), tuple(factoring)
