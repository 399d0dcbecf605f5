"""What a rank keeps of its layers, as few large tensors of which the optimizer's state holds views.

Layers of one owner are put behind one another, those that are alike next to each other: same curvature, same sides of
W[b, o, i], same param_group. So a step costs a few operations for each kind of layer and not a few for each layer:

    vectors      one flat tensor for everything of a layer's form (momentum, sums of gradients, ...)
    statistics   for layers that are alike one tensor [blocks of all, ...] of each statistic and of its inverse, in the
                 form in which the cells keep them (LayerState.forms)
    numbers      clocks, dampings, step counts: one small tensor on the host, and the same numbers as python lists

`optimizer.state` has the fixed keys and shapes that trainers and checkpoints know. Trainers replace its dictionaries
and tensors, so `Storage.sync` looks at every step whether each tensor is still the view that was put there; one that is
not gives its values to the storage and its place to the view.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from natgrad.layer_state import LayerState
from natgrad.layers import UncurvedParameter
from natgrad.layers.layer import real, real_type
from natgrad.parallel import is_sharded
from natgrad.readings import Readings

State = Mapping[Any, dict[str, Any]]
Kind = tuple[torch.dtype, torch.device, torch.dtype]
"""The type of what is kept, the device, and the type in which gradients travel."""


NUMBERS = 16
"""So many numbers of one name and layer are kept as numbers at most; what is larger stays a tensor of its own."""


class View(NamedTuple):
    """How a parameter's numbers lie in a flat vector."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    def of(self, vector: Tensor, begin: int = 0) -> Tensor:
        """The parameter's numbers in a flat vector that begins at this place of the layout."""
        return vector.as_strided(self.size, self.stride, vector.storage_offset() + self.start - begin)


class Layout:
    """The places of all layers of one type and device in a flat vector, owner by owner, param_group by param_group.

    alike: layers with the same value are interchangeable in every formula, and stand next to each other. Those of one
    size follow, so that sums over layers of one size are few (Segment.sums). groups: the place of each one's
    param_group.
    """

    def __init__(
        self,
        kind: Kind,
        places: Sequence[int],
        cells: Sequence[LayerState],
        alike: Sequence[Hashable],
        groups: Sequence[int],
    ):
        self.kind = kind
        first = {key: k for k, key in reversed(list(enumerate(alike)))}
        loose = [isinstance(cell.layer, UncurvedParameter) for cell in cells]
        sizes = [cell.layer.numel for cell in cells]
        least: dict[Hashable, int] = {}
        for key, size in zip(alike, sizes):
            least[key] = min(size, least.get(key, size))

        def rank(k: int) -> tuple[int, ...]:
            return cells[k].owner, loose[k], groups[k], least[alike[k]], first[alike[k]], sizes[k], k

        self.order = sorted(places, key=rank)
        self.start: dict[int, int] = {}
        self.views: dict[nn.Parameter, View] = {}
        self.numel = 0
        for k in self.order:
            layer = cells[k].layer
            self.start[k] = self.numel
            self.views |= zip(layer.parameters, views_of(cells[k], self.numel))
            self.numel += layer.shape.numel


def views_of(cell: LayerState, start: int) -> list[View]:
    """How the parameters of a layer lie in a flat vector in which its W[b, o, i] begins at `start`."""
    layer = cell.layer
    marked = torch.empty(layer.shape, dtype=torch.float32, device="meta")
    found = []
    for parameter, part in zip(layer.parameters, layer.unpack(marked)):
        part, kind = real(part), type(layer).__name__
        if part.untyped_storage()._cdata != marked.untyped_storage()._cdata:
            raise TypeError(f"{kind}.unpack copies; return views of the matrix (see Layer.unpack)")
        if part.shape != real(parameter.detach()).shape:
            raise TypeError(
                f"{kind}.unpack gives {tuple(part.shape)} for a parameter of shape {tuple(parameter.shape)}; return "
                "tensors shaped like the layer's parameters"
            )
        found.append(View(tuple(part.shape), part.stride(), start + int(part.storage_offset())))
    return found


class StepVector:
    """A flat vector of some layers of a layout, neighbours, whose memory is there within a step.

    Between steps its memory is free, and its views of parameters stay: to make hundreds of them in every step takes
    the host longer than all arithmetic of a small network.

    Args:
        layout: of the vector.
        begin: the place of the first layer in it.
        cells: the layers, in the layout's order.
        places: the place of each of their parameters among all parameters of all layers.
        dtype: of the vector.
        lasting: the memory stays too, at one address.

    """

    def __init__(
        self,
        layout: Layout,
        begin: int,
        cells: Sequence[LayerState],
        places: Mapping[nn.Parameter, int],
        dtype: torch.dtype,
        lasting: bool = False,
    ):
        self.layout, self.begin, self.dtype, self.lasting = layout, begin, dtype, lasting
        self.parameters = [p for cell in cells for p in cell.layer.parameters]
        self.numel = sum(cell.layer.shape.numel for cell in cells)
        self._places = [places[p] for p in self.parameters]
        self._complex = any(p.is_complex() for p in self.parameters)
        self._flat: Tensor | None = None
        self._views: dict[nn.Parameter, Tensor] = {}

    def flat(self) -> Tensor:
        """The vector; what it holds is not defined."""
        if self._flat is None:
            self._flat = torch.empty(self.numel, dtype=self.dtype, device=self.layout.kind[1])
            self._views = {p: self.layout.views[p].of(self._flat, self.begin) for p in self.parameters}
        elif not self._flat.untyped_storage().nbytes():
            self._flat.untyped_storage().resize_(self.numel * self._flat.element_size())
        return self._flat

    def views(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Tensors of the shapes of these parameters, of real numbers, which share the vector's memory."""
        views = self._views
        return [views[p] for p in parameters]

    def fill(self, values: Sequence[Tensor | None], whole: bool) -> Tensor:
        """The vector with a tensor for each of all parameters of all layers, zero where there is none.

        whole: there are all.
        """
        flat, views = self.flat(), list(self._views.values())
        own = [values[k] for k in self._places]
        if not whole:
            flat.zero_()
            views = [view for view, value in zip(views, own) if value is not None]
        chosen = own if whole else [value for value in own if value is not None]
        if self._complex:
            chosen = [real(value) for value in chosen if value is not None]
        if chosen:
            torch._foreach_copy_(views, chosen)  # type: ignore[arg-type]
        return flat

    def release(self) -> None:
        """The step is over. Where somebody keeps a part of the vector, all of it becomes theirs."""
        if self._flat is None or self.lasting:
            return
        storage, count = self._flat.untyped_storage(), getattr(torch._C, "_storage_Use_Count", None)
        ours = 2 + len(self._views)  # the vector, `storage` and the views
        if count is None or count(storage._cdata) > ours:  # torch's count is not public: without it nothing is reused
            self._flat, self._views = None, {}
        else:
            storage.resize_(0)


SHARED = re.compile(r"step|scalars|passes|.*_(clock|damping|budget)")
"""The names of numbers that every rank has alike."""


class NumberTable:
    """Numbers of one name: a tensor on the host with a row for each of its places, and python's copy of it."""

    def __init__(self, values: Sequence[Tensor]):
        self.base = torch.stack([value.detach().cpu() for value in values])
        self.views = tuple(self.base.unbind())
        self.read()

    stamp = 0
    """Another number after every change."""

    def read(self) -> None:
        """Take what the tensor holds."""
        self.rows: list[Any] = self.base.tolist()
        self.version, self.changed = self.base._version, False
        self.stamp += 1

    def write(self) -> None:
        """Bring the tensor up to date."""
        if self.base._version != self.version and not self.changed:  # somebody has written into the tensor
            self.read()
        if self.changed:
            self.base.copy_(torch.tensor(self.rows, dtype=self.base.dtype))
            self.version, self.changed = self.base._version, False

    def tensor(self) -> Tensor:
        """All numbers as they are now."""
        self.write()
        return self.base

    def take(self, rows: slice | list[int], values: Tensor) -> None:
        """New values for these rows."""
        self.write()
        self.base[rows] = values.to(self.base.dtype)
        self.read()

    def add(self, value: int) -> None:
        """Every number grows by this."""
        self.write()
        self.base += value
        self.rows = [row + value for row in self.rows]
        self.version = self.base._version
        self.stamp += 1

    def fill(self, values: Tensor) -> None:
        """The same numbers in every row."""
        self.base.copy_(values)
        self.read()

    def set(self, row: int, value: Any) -> None:
        """A new value, for the tensor at the next `write`."""
        self.rows[row] = value
        self.changed = True
        self.stamp += 1


class Vector(NamedTuple):
    """A flat tensor of what a rank keeps of its layers under one name, and where each layer's part begins."""

    flat: Tensor
    start: Mapping[int, int]


@dataclass(frozen=True)
class Run:
    """Layers in a row, all alike, at their owner: places among the cells, blocks [begin, end) of their statistics."""

    places: tuple[int, ...]
    stack: int
    begin: Mapping[str, int]
    end: Mapping[str, int]


class Storage:
    """The tensors behind `optimizer.state` on this rank.

    Args:
        cells: all layers of all ranks.
        state: the optimizer's state as it is now; its tensors become views.
        group: the place of a parameter's param_group.
        rank: this rank; without owners every layer is its own.
        readings: by which numbers of the layers reach the host.
        fixed: whether vectors of gradients are always the same tensors.

    """

    def __init__(
        self,
        cells: Sequence[LayerState],
        state: State,
        group: Callable[[nn.Parameter], int],
        rank: int,
        readings: Readings,
        fixed: bool = False,
    ):
        self.cells, self.rank, self.readings = cells, rank, readings
        alike = self._alike(group)
        kinds: dict[Kind, list[int]] = {}
        for k, cell in enumerate(cells):
            kinds.setdefault(kind_of(cell), []).append(k)
        groups = [group(cell.layer.parameters[0]) for cell in cells]
        self.layouts = [Layout(kind, places, cells, alike, groups) for kind, places in kinds.items()]
        self.mine = [[k for k in layout.order if cells[k].owner == rank] for layout in self.layouts]
        self.parameters = [p for cell in cells for p in cell.layer.parameters]
        places = {p: k for k, p in enumerate(self.parameters)}
        begins = [layout.start[mine[0]] if mine else 0 for layout, mine in zip(self.layouts, self.mine)]
        self.gradients, self.moves = (
            [
                StepVector(layout, begin, [cells[k] for k in mine], places, layout.kind[0], fixed)
                for layout, begin, mine in zip(self.layouts, begins, self.mine)
            ]
            for _ in range(2)
        )
        """Room for the gradients of this rank's layers in a step, and for what their weights move by."""
        self.outgoing = [
            StepVector(layout, 0, [cells[k] for k in layout.order], places, layout.kind[2]) for layout in self.layouts
        ]
        """Room for this rank's own gradients of all ranks' layers."""
        self.stack_of: dict[int, int] = {}
        self._place = {k: place for place, k in enumerate(k for layout in self.layouts for k in layout.order)}
        self.vectors: list[dict[str, Vector]] = []
        self.statistics: dict[tuple[int, str], Tensor] = {}
        self.blocks: dict[tuple[int, str], tuple[int, int]] = {}
        self.tables: dict[str, NumberTable] = {}
        self.places: dict[nn.Parameter, dict[str, tuple[NumberTable, int]]] = {}
        self.bound: dict[nn.Parameter, dict[str, Tensor]] = {}
        self._cell_of = {p: cell for cell in cells for p in cell.layer.parameters}
        self.masters = any("master" in state[p] for cell in cells for p in cell.layer.parameters)
        """Whether weights are kept in more precision than the model's."""
        self._bind_numbers(state)
        for layout, mine in zip(self.layouts, self.mine):
            self.vectors.append(self._bind_vectors(state, mine))
            self._bind_statistics(state, layout, alike)
        self.clocks = [table for name, table in self.tables.items() if name.split()[0].endswith("_clock")]
        for cell in cells:
            cell.numbers = Numbers(self.places[cell.layer.parameters[0]])
        self._seen = Seen.of(state, self.bound)

    def by_cell(self, values: Sequence[Any]) -> list[list[Any]]:
        """What belongs to each of `parameters`, layer by layer."""
        found = iter(values)
        return [[next(found) for _ in cell.layer.parameters] for cell in self.cells]

    def release(self) -> None:
        """A step is over: its vectors need no memory."""
        for vector in (*self.gradients, *self.outgoing, *self.moves):
            vector.release()

    def _alike(self, group: Callable[[nn.Parameter], int]) -> list[Hashable]:
        """For each layer what it has in common with others."""
        return [likeness(cell, group, k) for k, cell in enumerate(self.cells)]

    def _bind(self, state: State, parameter: nn.Parameter, key: str, view: Tensor) -> None:
        state[parameter][key] = view
        self.bound.setdefault(parameter, {})[key] = view

    def _bind_numbers(self, state: State) -> None:
        found: dict[str, list[tuple[nn.Parameter, str, Tensor]]] = {}
        for cell in (self.cells[k] for layout in self.layouts for k in layout.order):
            for parameter in cell.layer.parameters:
                for key, value in state[parameter].items():
                    if is_number(cell, key, value):
                        found.setdefault(f"{key} {tuple(value.shape)} {value.dtype}", []).append(
                            (parameter, key, value)
                        )
        for name, entries in found.items():
            table = self.tables[name] = NumberTable([value for _, _, value in entries])
            for row, ((parameter, key, _), view) in enumerate(zip(entries, table.views)):
                self.places.setdefault(parameter, {})[key] = table, row
                self._bind(state, parameter, key, view)

    def _bind_vectors(self, state: State, mine: Sequence[int]) -> dict[str, Vector]:
        weights = {k: self.cells[k].layer.parameters[0] for k in mine}
        keys = dict.fromkeys(
            key
            for k in mine
            for key, value in state[weights[k]].items()
            if isinstance(value, Tensor) and value.shape == self.cells[k].layer.shape and self._is_vector(k, key, value)
        )
        vectors = {}
        for key in keys:
            having = [k for k in mine if key in state[weights[k]]]
            flat, start, place = torch.cat([state[weights[k]][key].reshape(-1) for k in having]), {}, 0
            for k in having:
                shape = self.cells[k].layer.shape
                start[k] = place
                self._bind(state, weights[k], key, flat[place : place + shape.numel].view(shape))
                place += shape.numel
            vectors[key] = Vector(flat, start)
        return vectors

    def _is_vector(self, k: int, key: str, value: Tensor) -> bool:
        """Whether a name is not that of a statistic, of which some have a layer's shape; nor a part of all ranks."""
        cell = self.cells[k]
        names = {f"{name}{end}" for name in cell.keys for end in ("", "_before", "_inverse")}
        return key != "master" and key not in names and key not in cell.row_names and not is_sharded(value)

    def _bind_statistics(self, state: State, layout: Layout, alike: Sequence[Hashable]) -> None:
        for _, group in groupby(layout.order, key=lambda k: (self.cells[k].owner, alike[k])):
            places = list(group)
            stack = len(set(self.stack_of.values()))
            self.stack_of |= dict.fromkeys(places, stack)
            weights = [self.cells[k].layer.parameters[0] for k in places]
            if self.cells[places[0]].by_rows:
                continue
            for name in self.cells[places[0]].keys:
                for key in (name, f"{name}_before", f"{name}_inverse"):
                    if key not in state[weights[0]]:
                        continue
                    values = [state[weight][key] for weight in weights]
                    base, begin = torch.cat(values) if len(values) > 1 else values[0], 0
                    for k, weight, value in zip(places, weights, values):
                        self.blocks[k, key] = begin, begin + len(value)
                        self._bind(state, weight, key, base[begin : begin + len(value)])
                        begin += len(value)
                    self.statistics[stack, key] = base

    @property
    def device(self) -> torch.device:
        """Where numbers are added up that belong to all layers."""
        return self.layouts[0].kind[1]

    def place_of(self, k: int) -> int:
        """The place of a layer in the order in which layers are stored."""
        return self._place[k]

    def follows(self, first: int, second: int, key: str) -> bool:
        """Whether a layer's blocks of a statistic lie right behind those of another."""
        if self.stack_of[first] != self.stack_of[second] or (first, key) not in self.blocks:
            return False
        return self.blocks[first, key][1] == self.blocks[second, key][0]

    def blocks_of(self, first: int, last: int, key: str) -> Tensor:
        """The blocks of neighbouring layers as one tensor, which shares their memory."""
        return self.statistics[self.stack_of[first], key][self.blocks[first, key][0] : self.blocks[last, key][1]]

    def squares_of(self, first: int, last: int, key: str) -> Tensor:
        """`blocks_of`, with all entries: a copy where they are packed."""
        return self.cells[first].square(key, self.blocks_of(first, last, key))

    def write_squares(self, found: Sequence[tuple[int, int, str, Tensor]]) -> None:
        """Set blocks of neighbouring layers, from the first to the last, of a key, given with all of their entries."""
        kept, values = list[Tensor](), list[Tensor]()
        for first, last, key, value in found:
            own, form = self.blocks_of(first, last, key), self.cells[first].forms.get(key)
            kept += [own] if form is None else form.parts(own)
            values += [value] if form is None else form.places(value)
        if kept:
            torch._foreach_copy_(kept, values)

    def shared_numbers(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The clocks, dampings and counts of a parameter that are the same on all ranks, by name."""
        found = self.places.get(parameter, {})
        return {key: table.rows[row] for key, (table, row) in sorted(found.items()) if SHARED.fullmatch(key)}

    def table(self, key: str) -> NumberTable:
        """The numbers of a name that only one table has."""
        (found,) = (table for name, table in self.tables.items() if name.split()[0] == key)
        return found

    def sync(self, state: State) -> None:
        """Take over what others have put into the state since, and put the views back."""
        if not self._seen.unchanged(state):
            self._take_over(state)
            self._seen = Seen.of(state, self.bound)
        for table in self.tables.values():
            if table.base._version != table.version:
                table.read()

    def _take_over(self, state: State) -> None:
        for parameter, views in self.bound.items():
            own = state[parameter]
            for key, view in views.items():
                value = own.get(key)
                if value is view:
                    continue
                if value is None:
                    raise ValueError(self.lost(key, parameter))
                view.copy_(self._cell_of[parameter].packed(key, value))
                own[key] = view

    @staticmethod
    def lost(key: str, parameter: nn.Parameter) -> str:
        """What to say where a state lacks a name."""
        return (
            f"optimizer.state has lost {key} of a parameter of shape {tuple(parameter.shape)}: load a "
            "whole state with load_state_dict(), or build the optimizer again to begin anew"
        )

    @property
    def clocks_stamp(self) -> int:
        """Another number after every change of a clock."""
        return sum(table.stamp for table in self.clocks)

    def count_step(self) -> None:
        """All parameters have made one more step."""
        self.table("step").add(1)

    def write(self) -> None:
        """Bring the numbers in the state up to date."""
        for table in self.tables.values():
            table.write()

    def present(self, vectors: Sequence[Tensor | None], present: Sequence[bool]) -> list[Tensor]:
        """Of vectors of this rank's layers, one a layout, the parts of those that are present."""
        found = []
        for layout, mine, vector in zip(self.layouts, self.mine, vectors):
            for row in adjacent(mine, (c for c in mine if present[c])):
                assert vector is not None
                begin = layout.start[row[0]] - layout.start[mine[0]]
                found.append(vector[begin : begin + sum(self.cells[c].layer.shape.numel for c in row)])
        return found

    def runs(self, places: Sequence[int]) -> list[Run]:
        """Layers in a row, in the layout's order, as runs of layers that are alike."""
        found = []
        for (stack, _), group in groupby(places, key=lambda k: (self.stack_of[k], self.cells[k].by_rows and k)):
            run = tuple(group)
            names = [] if self.cells[run[0]].by_rows else [f"{key}_inverse" for key in self.cells[run[0]].keys]
            begin = {name: self.blocks[run[0], name][0] for name in names}
            found.append(Run(run, stack, begin, {name: self.blocks[run[-1], name][1] for name in names}))
        return found


class Seen(NamedTuple):
    """A state as it was looked at last: its dictionaries, and the tensors that stood in them under their keys.

    Whether it is still the same is asked in every step, of a thousand tensors, and takes no loop of python's.
    """

    parameters: list[nn.Parameter]
    dictionaries: list[dict[str, Any]]
    owns: list[dict[str, Any]]  # the dictionary, the key and the tensor of each entry
    keys: list[str]
    views: list[Tensor]

    @classmethod
    def of(cls, state: State, bound: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> Seen:
        """The entries of `bound` as they are."""
        entries = [(state[p], key, view) for p, views in bound.items() for key, view in views.items()]
        columns = [list(column) for column in zip(*entries)] or [[], [], []]
        return cls(list(state.keys()), list(state.values()), *columns)

    def unchanged(self, state: State) -> bool:
        """Whether all dictionaries and all entries are those that were seen."""
        return (
            len(state) == len(self.dictionaries)
            and all(map(is_, state.keys(), self.parameters))
            and all(map(is_, state.values(), self.dictionaries))
            and all(map(is_, map(dict.get, self.owns, self.keys), self.views))
        )


class Numbers:
    """The numbers in the state of one parameter, by name. What is set reaches the state with `Storage.write`."""

    def __init__(self, places: Mapping[str, tuple[NumberTable, int]]):
        self.places = places

    def __getitem__(self, key: str) -> Any:
        table, row = self.places[key]
        return table.rows[row]

    def __setitem__(self, key: str, value: Any) -> None:
        table, row = self.places[key]
        table.set(row, value)

    def __contains__(self, key: str) -> bool:
        return key in self.places


def kind_of(cell: LayerState) -> Kind:
    """What decides which vectors a layer's numbers are in."""
    weight, *others = cell.layer.parameters
    wire = real(weight.detach()).dtype
    for other in others:
        wire = torch.promote_types(wire, real(other.detach()).dtype)
    return real_type(weight), weight.device, wire


def likeness(cell: LayerState, group: Callable[[nn.Parameter], int], place: int) -> Hashable:
    """What layers have in common that every formula may take together."""
    layer = cell.layer
    if isinstance(layer, UncurvedParameter):
        return "loose", group(layer.parameters[0])
    if cell.split:
        return place
    sides = () if cell.by_rows else tuple(m.shape(layer)[1:] for m in cell.statistics)
    return cell.curvature, layer.shape.out, layer.shape.inner, sides, group(layer.parameters[0])


def is_number(cell: LayerState, key: str, value: Any) -> bool:
    """Whether a state holds a few numbers on the host under a name: a clock, a damping, a count."""
    if not isinstance(value, Tensor) or key == "master" or key in cell.row_names:
        return False
    return value.dim() <= 1 and value.numel() <= NUMBERS and value.device.type == "cpu"


def adjacent(order: Sequence[int], chosen: Iterable[int]) -> list[list[int]]:
    """The chosen places in the given order, cut where others lie between."""
    wanted, found, last = set(chosen), list[list[int]](), -2
    for place, k in enumerate(order):
        if k in wanted:
            if place != last + 1:
                found.append([])
            found[-1].append(k)
            last = place
    return found
