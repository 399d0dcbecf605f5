"""What a rule of direction and a step size work on: layers of one rank with one param_group, as flat vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from natgrad.curvature.by_rows import ByRows
from natgrad.layer_state import LayerState
from natgrad.layers import UncurvedParameter
from natgrad.layers.layer import real
from natgrad.readings import Inputs
from natgrad.row_stacks import RowStacks
from natgrad.stacks import Layout, NumberTable, Run, StepVector, Storage, Vector, adjacent

KNOWN = 4  # sets of layers whose segments are kept
TOGETHER = 2**22  # numbers of each vector whose products are taken in one go: they take as much memory
LEAST_WEIGHT = 0.1  # of a healthy weight: a layer that starts at zero must be able to leave it


class Alike(NamedTuple):
    """Layers that are alike within a segment: where their numbers are in its vectors, as [blocks, out, inner]."""

    run: Run
    start: int
    stop: int
    form: tuple[int, int, int]


class Chunk(NamedTuple):
    """Numbers [start, stop) of a segment's vectors: (first, layers, numbers of each), one size behind the other."""

    start: int
    stop: int
    equal: list[tuple[int, int, int]]


@dataclass(eq=False)
class Outline:
    """All of a segment that does not change from step to step."""

    storage: Storage
    layout: Layout
    room: StepVector
    vectors: Mapping[str, Vector]
    places: list[int]
    curved: bool
    group_of: Callable[[nn.Parameter], int]
    groups: Callable[[], Sequence[dict[str, Any]]]

    def __post_init__(self) -> None:
        self.cells: list[LayerState] = [self.storage.cells[k] for k in self.places]
        self.parameters: list[nn.Parameter] = [p for cell in self.cells for p in cell.layer.parameters]
        self.views = [self.layout.views[p] for p in self.parameters]
        self.complex = any(p.is_complex() for p in self.parameters)
        self.group_places = [self.group_of(p) for p in self.parameters]
        self.by_group: dict[int, list[nn.Parameter]] = {}
        for p, place in zip(self.parameters, self.group_places):
            self.by_group.setdefault(place, []).append(p)
        self.start = self.layout.start[self.places[0]]
        self.sizes = [cell.layer.shape.numel for cell in self.cells]
        self.numel = sum(self.sizes)
        self.parts: list[Alike] = []
        for run in self.storage.runs(self.places):
            begin = self.layout.start[run.places[0]] - self.start
            shapes = [self.storage.cells[k].layer.shape for k in run.places]
            blocks = sum(shape.blocks for shape in shapes)
            end = begin + sum(shape.numel for shape in shapes)
            self.parts.append(Alike(run, begin, end, (blocks, *shapes[0][1:])))
        self.alone = len(self.parameters) == len(self.cells)
        self.owner_of = [k for k, cell in enumerate(self.cells) for _ in cell.layer.parameters]

    def moves(self) -> Tensor:
        """Room for what the layers' parameters are to move by; its views are those of `room`."""
        begin = self.start - self.room.begin
        return self.room.flat()[begin : begin + self.numel]

    @cached_property
    def factors(self) -> dict[int, dict[str, Any]]:
        """What the layers of each run are preconditioned with, by the run's first layer: views of the storage."""
        found = {}
        for run, *_ in self.parts:
            cell = self.storage.cells[run.places[0]]
            found[run.places[0]] = {
                key: cell.factor(name, self.storage.statistics[run.stack, name][run.begin[name] : run.end[name]])
                for key, name in zip(cell.keys, run.begin)
            }
        return found

    @cached_property
    def chunks(self) -> list[Chunk]:
        """The vectors in pieces of at most TOGETHER numbers; a larger layer is cut."""
        found, start, sizes = list[Chunk](), 0, list[int]()

        def close() -> int:
            equal, begin = list[tuple[int, int, int]](), 0
            for size, group in groupby(sizes):
                equal.append((begin, count := len(list(group)), size))
                begin += count * size
            found.append(Chunk(start, start + begin, equal))
            sizes.clear()
            return found[-1].stop

        for layer in self.sizes:
            if sizes and sum(sizes) + layer > TOGETHER:
                start = close()
            while layer > TOGETHER:
                sizes.append(TOGETHER)
                layer -= TOGETHER
                start = close()
            sizes.append(layer)
        close()
        return found

    @cached_property
    def layer_of_part(self) -> Tensor | None:
        """The layer of each part of a layer in `chunks`; None where no layer is cut."""
        parts = [k for k, size in enumerate(self.sizes) for _ in range(max(1, -(-size // TOGETHER)))]
        return None if len(parts) == len(self.sizes) else torch.tensor(parts, device=self.layout.kind[1])

    def row_stacks(self, parts: Sequence[Alike]) -> RowStacks:
        """The rows of layers in the space of samples."""
        first = parts[0].run.places[0]
        if first not in self._rows:
            self._rows[first] = RowStacks({k: self.storage.cells[k] for part in parts for k in part.run.places})
        return self._rows[first]

    @cached_property
    def _rows(self) -> dict[int, RowStacks]:
        return {}

    @cached_property
    def tables(self) -> dict[str, tuple[NumberTable, slice | list[int]]]:
        """The tables that hold a row for each layer, and the rows, by the numbers' name (see `numbers`)."""
        return {}

    def numbers(self, key: str) -> tuple[NumberTable, slice | list[int]]:
        """The table that holds a row of this name for each layer, and the rows."""
        if key not in self.tables:
            (table, first), *others = [cell.numbers.places[key] for cell in self.cells]
            if any(other is not table for other, _ in others):
                raise KeyError(f"{key} is of another shape in every layer: take it from each cell's state()")
            rows, stop = [first, *(row for _, row in others)], first + len(self.cells)
            self.tables[key] = table, slice(first, stop) if rows == list(range(first, stop)) else rows
        return self.tables[key]

    @cached_property
    def lengths(self) -> Tensor:
        """How many numbers each layer has, on the layers' device."""
        return torch.tensor(self.sizes, device=self.layout.kind[1])

    @cached_property
    def layer_of(self) -> Tensor:
        """The layer of each parameter."""
        return torch.tensor(self.owner_of, device=self.layout.kind[1])

    @cached_property
    def floors(self) -> Tensor:
        """The least norm that a layer's weights are taken to have."""
        found = [LEAST_WEIGHT * c.layer.scale * c.layer.numel**0.5 for c in self.cells]
        return torch.tensor(found, dtype=self.layout.kind[0], device=self.layout.kind[1])


class Segment:
    """What some layers are about to do, at their owner: neighbours in the rank's vectors, all in one param_group.

    Vectors are flat [n], the layers' W[b, o, i] behind one another. `group` is that of the layers' weights.

        gradient    mean gradient of the loss
        direction   to be filled in by the rule: the step is -lr times it
        state       what is kept of these layers, by name: the rule's and the length's vectors, changed in place
        curved      False: the fallback's direction, as long as the weight
        keep        by this the rule has multiplied its past directions before it added this step's
        past        the direction of the step before, where somebody keeps it
        all_rates   the learning rate of each param_group, scalars on the layers' device
        products    what a length that looks back needs of the step before, entry by entry [n]
        terms       the gradient is that of the mean loss times so many: of a sum over a rank's samples
    """

    def __init__(
        self,
        outline: Outline,
        gradient: Tensor,
        inputs: Inputs,
        rates: Sequence[Tensor],
        fresh: frozenset[int] = frozenset(),
    ):
        self.outline, self.gradient, self.fresh = outline, gradient, fresh
        self.all_rates = rates
        self.direction = gradient
        self.curved = outline.curved
        self.group = outline.groups()[outline.group_places[0]]
        self.state = SegmentState(outline, inputs)
        self.keep, self.terms = 0.0, 1.0
        self.past: Tensor | None = None
        self.products: Tensor | None = None

    @property
    def lr(self) -> Tensor:
        """The learning rate of the layers' weights, a scalar in double precision on their device."""
        return self.all_rates[self.outline.group_places[0]]

    @property
    def cells(self) -> list[LayerState]:
        """The layers, in the vectors' order."""
        return self.outline.cells

    def pieces(self, vector: Tensor) -> list[Tensor]:
        """A vector as one tensor a layer, W[b, o, i] each; they share its memory."""
        parts = vector.split(self.outline.sizes)
        return [part.view(cell.layer.shape) for part, cell in zip(parts, self.outline.cells)]

    def views(self, vector: Tensor) -> list[Tensor]:
        """A vector as tensors of the shapes of `parameters` (of real numbers); they share its memory."""
        begin = vector.storage_offset() - self.outline.start
        return [vector.as_strided(size, stride, begin + start) for size, stride, start in self.outline.views]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of all layers, in the vectors' order."""
        return self.outline.parameters

    def precondition(self, vector: Tensor) -> Tensor:
        """The damped natural gradient of a gradient, layers that are alike at once."""
        found: list[Tensor] = []
        for rows, some in groupby(self.outline.parts, key=self._rows_of):
            parts = list(some)
            if rows is None:
                found += [self._preconditioned(part, vector).reshape(-1) for part in parts]
            else:
                found += [one.reshape(-1) for one in self._by_rows(rows, parts, vector)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _rows_of(self, part: Alike) -> ByRows | None:
        """The curvature of a layer in the space of samples."""
        curvature = self.outline.storage.cells[part.run.places[0]].curvature
        return curvature if isinstance(curvature, ByRows) else None

    def _by_rows(self, curvature: ByRows, parts: Sequence[Alike], vector: Tensor) -> list[Tensor]:
        """Layers in the space of samples, which share their solves."""
        groups = self.outline.row_stacks(parts).groups()
        new = self.fresh if vector is self.gradient else frozenset()
        starts = {part.run.places[0]: (part.start, part.form) for part in parts}
        pieces = []
        for places, _ in groups:
            start, form = starts[places[0]]
            pieces.append(vector[start : start + len(places) * math.prod(form)].view(len(places), *form))
        fresh = [[k in new for k in places] for places, _ in groups]
        return curvature.precondition_all([kept for _, kept in groups], pieces, self.group["damping"], fresh)

    def _preconditioned(self, part: Alike, vector: Tensor) -> Tensor:
        run, start, stop, form = part
        cell = self.outline.storage.cells[run.places[0]]
        if isinstance(cell.layer, UncurvedParameter):
            return vector[start:stop].clone()
        piece = vector[start:stop].view(form)
        return cell.curvature.precondition(self.outline.factors[run.places[0]], piece, self.group["damping"])

    def add_weights(self, vector: Tensor, decay: float | None = None) -> Tensor:
        """The vector plus each parameter times the weight decay of its group, or times `decay`."""
        groups = self.outline.groups()
        decays = [groups[place]["weight_decay"] if decay is None else decay for place in self.outline.by_group]
        chosen = [(own, parameters) for own, parameters in zip(decays, self.outline.by_group.values()) if own]
        if not chosen:
            return vector
        weights, alike = self.outline.moves(), len(chosen) == len(decays) == 1
        if not alike:
            weights.zero_()
        for factor, parameters in chosen:
            views = self.outline.room.views(parameters)
            torch._foreach_copy_(views, [real(p.detach()) for p in parameters])
            if not alike:
                torch._foreach_mul_(views, factor)
        return torch.add(vector, weights, alpha=chosen[0][0] if alike else 1.0)

    def rates(self, name: str) -> float | Tensor:
        """The learning rate of each number ("lr", "lr_last"): one for all, or a vector where groups differ."""
        groups = self.outline.groups()
        numbers = {place: groups[place].get(name, groups[place]["lr"]) for place in self.outline.by_group}
        if len(set(numbers.values())) == 1:
            return numbers[self.outline.group_places[0]]
        vector = torch.empty_like(self.gradient)
        for view, place in zip(self.views(vector), self.outline.group_places):
            view.fill_(numbers[place])
        return vector

    def sums(self, *rows: tuple[Tensor, ...]) -> Tensor:
        """The sums over each layer's numbers of products, in double precision [rows, layers].

        A row has the factors of one product: a vector [n], others, and scalars.
        """
        found = []
        for start, stop, equal in self.outline.chunks:
            products, long = self.gradient.new_empty(len(rows), stop - start), stop - start
            for row, product in zip(rows, products.unbind()):
                first, *more = [factor[start:stop] if factor.dim() else factor for factor in row]
                if not more:
                    product.copy_(first)
                for k, factor in enumerate(more):
                    torch.mul(product if k else first, factor, out=product)
            for begin, count, size in equal:
                part = products.as_strided((len(rows), count, size), (long, size, 1), begin)
                found.append(part.sum(2, dtype=torch.float64))
        sums = found[0] if len(found) == 1 else torch.cat(found, 1)
        cut = self.outline.layer_of_part
        return sums if cut is None else sums.new_zeros(len(rows), len(self.cells)).index_add_(1, cut, sums)

    def norms(self, vector: Tensor) -> Tensor:
        """The norm of each layer's part of a vector [layers]."""
        return torch.stack(torch._foreach_norm(list(vector.split(self.outline.sizes))))

    def weight_norms(self) -> Tensor:
        """The norm of each layer's weights, bias included [layers]."""
        dtype = self.outline.layout.kind[0]
        norms = torch.stack(torch._foreach_norm([real(p.detach()) for p in self.outline.parameters], 2, dtype=dtype))
        if self.outline.alone:
            return norms
        squares = torch.zeros(len(self.outline.cells), dtype=norms.dtype, device=norms.device)
        return squares.index_add_(0, self.outline.layer_of, norms.square()).sqrt()

    def spread(self, factors: Tensor) -> Tensor:
        """A number for each layer [layers] as one for each of its entries [n]."""
        return factors.repeat_interleave(self.outline.lengths, output_size=self.outline.numel)


class SegmentState(MutableMapping[str, Tensor]):
    """What the optimizer's state holds of a segment's layers by name: flat vectors [n], or numbers [layers, ...].

    Numbers live on the host. They are read as a copy on the layers' device; what is assigned is read here at once, and
    reaches the host's table at the next read (readings.py).
    """

    def __init__(self, outline: Outline, inputs: Inputs):
        self.outline, self.inputs = outline, inputs
        self.assigned: dict[str, Tensor] = {}  # numbers, in this step

    def __getitem__(self, key: str) -> Tensor:
        if key in self.assigned:
            return self.assigned[key]
        vector, first = self.outline.vectors.get(key), self.outline.places[0]
        if vector is None:
            table, rows = self.outline.numbers(key)
            return self.inputs.get(lambda: table.tensor()[rows], self.outline.layout.kind[1])
        begin = vector.start[first]
        return vector.flat[begin : begin + self.outline.numel]

    def __setitem__(self, key: str, value: Tensor) -> None:
        if key not in self.outline.vectors:
            table, rows = self.outline.numbers(key)
            shape = (len(self.outline.cells), *table.base.shape[1:])
            self.assigned[key] = value
            self.outline.storage.readings.ask(value, lambda told: table.take(rows, told.view(shape)))
            return
        own = self[key]
        if value.data_ptr() != own.data_ptr():
            own.copy_(value)

    def __delitem__(self, key: str) -> None:
        raise TypeError(f"the state's names are fixed; {key} stays")

    def __iter__(self) -> Iterator[str]:
        first = self.outline.places[0]
        yield from (key for key, vector in self.outline.vectors.items() if first in vector.start)
        yield from self.outline.cells[0].numbers.places

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Outlines:
    """The segments of a step, from the layers that take part; those of the last few sets of layers are kept.

    apart: each layer is a segment of its own, for rules that keep numbers of each.
    """

    def __init__(
        self,
        storage: Storage,
        group_of: Callable[[nn.Parameter], int],
        groups: Callable[[], Sequence[dict[str, Any]]],
        takes_loose: bool,
        apart: bool = False,
    ):
        self.storage, self.group_of, self.groups, self.takes_loose = storage, group_of, groups, takes_loose
        self.apart = apart
        self.known: dict[tuple[int, ...], list[list[Outline]]] = {}

    def of(self, places: Iterable[int]) -> list[list[Outline]]:
        """For each layout, the segments of the layers at these places, which this rank owns."""
        chosen = tuple(places)
        found = self.known.pop(chosen, None)
        if found is None:
            found = [
                [
                    Outline(self.storage, layout, room, vectors, run, curved, self.group_of, self.groups)
                    for row in adjacent(mine, chosen)
                    for curved, run in self._cut(row)
                ]
                for layout, room, mine, vectors in zip(
                    self.storage.layouts, self.storage.moves, self.storage.mine, self.storage.vectors
                )
            ]
        self.known[chosen] = found  # the last one last
        if len(self.known) > KNOWN:
            del self.known[next(iter(self.known))]
        return found

    def _cut(self, row: Sequence[int]) -> Iterator[tuple[bool, list[int]]]:
        """Neighbours in pieces of one group, and with curvature or without."""
        cells = self.storage.cells

        def kind(k: int) -> tuple[int, bool, int]:
            curved = self.takes_loose or not isinstance(cells[k].layer, UncurvedParameter)
            return self.group_of(cells[k].layer.parameters[0]), curved, k if self.apart and curved else -1

        for (_, curved, _), run in groupby(row, key=kind):
            yield curved, list(run)
