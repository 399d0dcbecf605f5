"""A step on a model of which every rank holds parts (FSDP2, HSDP): rules on parts, curvature at the layers' owners.

Weights, gradients and all that is kept in their form (momentum, Adam's moments, ...) lie in parts on all ranks. A rule
and a length work on this rank's parts of all layers. Only the natural gradient needs whole layers:

    1   the parts of gradients travel to the layers' owners       (one all-to-all)
    2   owners precondition; their statistics and inverses are their own, as on plain models
    3   the parts of directions travel back to all ranks          (one all-to-all)

With R replicas an owner takes the gradient from the ranks of its own replica, and sends the direction to all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from natgrad.curvature import Identity
from natgrad.layer_state import LayerState
from natgrad.layers import Layer, UncurvedParameter
from natgrad.layers.shards import Cut, LayerShard, shard_of
from natgrad.optim.segments import Outlines, Segment
from natgrad.optim.step_size import Natural
from natgrad.parallel import ShardedWorld, Sharding, World, is_sharded, like, local_of
from natgrad.readings import Inputs, Readings
from natgrad.refresh import Every
from natgrad.stacks import NumberTable, State, Storage, likeness


class Shards:
    """The parts that this rank has of all parameters, as plain parameters that share their memory."""

    def __init__(self, sharding: Sharding):
        self.sharding = sharding
        self.whole_of: dict[nn.Parameter, nn.Parameter] = {}
        self._layers: dict[Layer, LayerShard] = {}

    def of(self, layer: Layer) -> LayerShard:
        """The part that this rank has of a layer."""
        found = self._layers.get(layer)
        if found is None:
            cut = Cut(layer)
            start, stop = self.sharding.bounds(cut.form[1])[self.sharding.shard]
            parts = [nn.Parameter(local_of(p), p.requires_grad) for p in layer.parameters]
            self.whole_of |= zip(parts, layer.parameters)
            found = self._layers[layer] = shard_of(layer, cut, parts, start, stop)
        return found

    def elsewhere(self, layer: Layer, rank: int) -> LayerShard:
        """The part that another rank has of a layer, on tensors without values."""
        cut, shard = Cut(layer), self.sharding.place_of[rank][1]
        own = [(local_of(p), self.sharding.bounds(p.shape[0])[shard]) for p in layer.parameters]
        parts = [nn.Parameter(p.new_empty(stop - start, *p.shape[1:]), False) for p, (start, stop) in own]
        return shard_of(layer, cut, parts, *self.sharding.bounds(cut.form[1])[shard])

    def keep(self, layers: Iterable[Layer]) -> None:
        """Forget the parts of all other layers."""
        self._layers = {layer: self.of(layer) for layer in layers}
        parts = {p for shard in self._layers.values() for p in shard.parameters}
        self.whole_of = {part: whole for part, whole in self.whole_of.items() if part in parts}

    def look(self) -> None:
        """Take the parameters and gradients as they are now."""
        for part, whole in self.whole_of.items():
            now = local_of(whole)
            if now.data_ptr() != part.data_ptr():  # FSDP has allocated them anew
                part.data = now
            part.requires_grad_(whole.requires_grad)
            part.grad = None if whole.grad is None else local_of(whole.grad)

    def wrapped(self, shard: LayerShard, part: Tensor) -> Tensor:
        """What is kept of a layer, of which this is our part, as a tensor that is cut over ranks."""
        return self.sharding.whole(part.view(shard.kept_shape), shard.cut.shape, shard.cut.dim)


class Kept(NamedTuple):
    """A tensor in the optimizer's state that is cut over ranks, and the view of a flat vector that it stands for."""

    parameter: nn.Parameter
    key: str
    tensor: Tensor
    view: Tensor


class ShardStorage(Storage):
    """Flat vectors of this rank's parts of all layers. Numbers and statistics are those of `owners`.

    cells: a cell for each part, in the order of the owners' cells.
    """

    def __init__(
        self,
        shards: Shards,
        owners: Storage,
        state: State,
        group: Callable[[nn.Parameter], int],
        world: World,
        readings: Readings,
    ):
        self.shards, self.owners, self._group = shards, owners, group
        self.world = ShardedWorld(world, shards.sharding.replicas)
        shards.keep(cell.layer for cell in owners.cells)
        shards.look()
        parts = [shards.of(cell.layer) for cell in owners.cells]
        own = {
            p: self._own(state[whole], part)
            for part in parts
            for p, whole in zip(part.parameters, part.whole.parameters)
        }
        cells = [self._cell(cell, part, own, world.rank) for cell, part in zip(owners.cells, parts)]
        super().__init__(cells, own, lambda p: group(shards.whole_of[p]), world.rank, readings)
        layer_of = {p: part for part in parts for p in part.parameters}
        self.kept: list[Kept] = []
        for part, views in self.bound.items():
            whole = shards.whole_of[part]
            for key, view in views.items():
                tensor = shards.wrapped(layer_of[part], view)
                self.kept.append(Kept(whole, key, tensor, view))
                state[whole][key] = tensor
        self.parts = own

    @staticmethod
    def _own(state: dict[str, Any], part: LayerShard) -> dict[str, Any]:
        """The parts that this rank has of a parameter's state: vectors in the form of the layer, a master as it is."""
        found = {key: local_of(value) for key, value in state.items() if is_sharded(value)}
        return {key: value if key == "master" else value.reshape(part.shape) for key, value in found.items()}

    @staticmethod
    def _cell(cell: LayerState, part: LayerShard, own: State, rank: int) -> LayerState:
        weight = part.parameters[0]
        return LayerState(cell.name, part, Identity(), rank, {}, lambda: own[weight], lambda: Every(1))

    def _alike(self, group: Callable[[nn.Parameter], int]) -> list[Any]:
        """By whole layers, whose order is the same on all ranks."""
        return [likeness(cell, self._group, k) for k, cell in enumerate(self.owners.cells)]

    def _bind_numbers(self, state: State) -> None:
        self.tables: dict[str, NumberTable] = self.owners.tables
        whole_of = self.shards.whole_of
        self.places = {p: self.owners.places[whole_of[p]] for p in state if whole_of[p] in self.owners.places}

    def release(self) -> None:
        super().release()
        self.owners.release()

    def sync(self, state: State) -> None:
        self.owners.sync(state)
        for parameter, key, tensor, view in self.kept:
            value = state[parameter].get(key)
            if value is tensor:
                continue
            if value is None:
                raise ValueError(self.lost(key, parameter))
            view.copy_(local_of(like(value, tensor)).view_as(view))
            state[parameter][key] = tensor
        for part, own in self.parts.items():
            if "master" in own:
                own["master"] = local_of(state[self.shards.whole_of[part]]["master"])


class ShardSegment(Segment):
    """A segment of this rank's parts of some layers. Sums and norms are those of whole layers: each is a message."""

    @property
    def _world(self) -> ShardedWorld:
        storage = self.outline.storage
        assert isinstance(storage, ShardStorage)
        return storage.world

    def sums(self, *rows: tuple[Tensor, ...]) -> Tensor:
        found = super().sums(*rows)
        self._world.sum_over_parts([found], "scalars")
        return found

    def norms(self, vector: Tensor) -> Tensor:
        return self._whole(super().norms(vector))

    def weight_norms(self) -> Tensor:
        return self._whole(super().weight_norms())

    def _whole(self, norms: Tensor) -> Tensor:
        squares = norms.double().square()
        self._world.sum_over_parts([squares], "scalars")
        return squares.sqrt().to(norms)


class Slice(NamedTuple):
    """The numbers of one layer that one rank has: (outer, rows, inner), rows from `start` on."""

    place: int
    start: int
    rows: int
    numel: int


class Route:
    """Which numbers go where, for the layers at these places: the same on all ranks, so nothing has to tell it."""

    def __init__(self, places: Sequence[int], storage: ShardStorage, world: World):
        owners, sharding = storage.owners, storage.shards.sharding
        cuts = {k: storage.shards.of(owners.cells[k].layer).cut.form for k in places}
        bounds = {k: sharding.bounds(n) for k, (_, n, _) in cuts.items()}
        owner = {k: owners.cells[k].owner for k in places}
        self.forms = cuts

        def piece(k: int, shard: int) -> Slice:
            (outer, _, inner), (start, stop) = cuts[k], bounds[k][shard]
            return Slice(k, start, stop - start, outer * (stop - start) * inner)

        by_owner: dict[int, list[int]] = {}
        for k in places:
            by_owner.setdefault(owner[k], []).append(k)
        mine, here = by_owner.get(world.rank, []), range(world.size)
        replica, shard = sharding.replica, sharding.shard
        place_of = sharding.place_of
        self.to_owner = [[piece(k, shard) for k in by_owner.get(r, ()) if place_of[r][0] == replica] for r in here]
        self.at_owner = [[piece(k, place_of[r][1]) for k in mine if place_of[r][0] == replica] for r in here]
        self.back = [[piece(k, place_of[r][1]) for k in mine] for r in here]
        self.home = [[piece(k, shard) for k in by_owner.get(r, ())] for r in here]
        rows = [sum(sum(p.numel for p in (piece(k, s) for k in places)) for s in [place_of[r][1]]) for r in here]
        own = [sum(piece(k, place_of[r][1]).numel for k in by_owner.get(r, ())) for r in here]
        whole = [sum(owners.cells[k].layer.numel for k in by_owner.get(r, ())) for r in here]
        self.received = [w - o for w, o in zip(whole, own)], [n - o for n, o in zip(rows, own)]


class AtOwners:
    """Natural gradients of parts: gradients travel to the layers' owners, directions travel back."""

    def __init__(self, storage: ShardStorage, outlines: Outlines, world: World):
        self.storage, self.outlines, self.world = storage, outlines, world
        self.inputs = Inputs()
        self._routes: dict[tuple[int, ...], Route] = {}

    def __call__(
        self, natural: Natural, segments: Sequence[Segment], gradients: Sequence[Tensor], fresh: frozenset[int]
    ) -> list[Tensor]:
        """`natural` at the owners, of parts of gradients. Parameters without curvature keep their gradient.

        fresh: layers whose rows were measured in this step.
        """
        cells = self.storage.owners.cells
        found = [gradient.clone() for gradient in gradients]
        parts: dict[torch.dtype, dict[int, tuple[Tensor, Tensor]]] = {}
        places = list[int]()
        for segment, gradient, direction in zip(segments, gradients, found):
            views = zip(segment.outline.places, segment.pieces(gradient), segment.pieces(direction))
            for k, *pair in views:
                if not isinstance(cells[k].layer, UncurvedParameter):
                    places.append(k)
                    parts.setdefault(gradient.dtype, {})[k] = pair[0], pair[1]
        whole = all(gradient is segment.gradient for segment, gradient in zip(segments, gradients))
        vectors = [room.flat() if room.parameters else None for room in self.storage.owners.gradients]
        at_owner = self._pieces(vectors)
        for dtype, own in parts.items():
            self._bring(self._route(own), dtype, own, at_owner)
        own_segments = self._segments(sorted(places), vectors, fresh if whole else frozenset())
        made = natural(own_segments, [segment.gradient for segment in own_segments])
        directions = {
            k: piece for s, vector in zip(own_segments, made) for k, piece in zip(s.outline.places, s.pieces(vector))
        }
        for dtype, own in parts.items():
            self._send_back(self._route(own), dtype, own, directions)
        return found

    def _route(self, own: Iterable[int]) -> Route:
        key = tuple(sorted(own))
        if key not in self._routes:
            self._routes[key] = Route(key, self.storage, self.world)
        return self._routes[key]

    def _pieces(self, vectors: Sequence[Tensor | None]) -> dict[int, Tensor]:
        """Where each layer that this rank owns lies in the owner's vectors, flat."""
        owners, found = self.storage.owners, dict[int, Tensor]()
        for layout, mine, vector in zip(owners.layouts, owners.mine, vectors):
            for k in mine:
                assert vector is not None
                begin = layout.start[k] - layout.start[mine[0]]
                found[k] = vector[begin : begin + owners.cells[k].layer.numel]
        return found

    def _bring(
        self, route: Route, dtype: torch.dtype, own: dict[int, tuple[Tensor, Tensor]], at: dict[int, Tensor]
    ) -> None:
        """Gradients to their owners."""
        received = self._send(
            route.to_owner, route.at_owner, dtype, lambda p: own[p.place][0], route.received[0], "gradients"
        )
        targets, values = list[Tensor](), list[Tensor]()
        for piece, value in received:
            targets.append(within(at[piece.place], route.forms[piece.place], piece))
            values.append(value.view_as(targets[-1]))
        if targets:
            torch._foreach_copy_(targets, values)

    def _send_back(
        self, route: Route, dtype: torch.dtype, own: dict[int, tuple[Tensor, Tensor]], directions: dict[int, Tensor]
    ) -> None:
        """Directions to everybody's parts."""

        def of(piece: Slice) -> Tensor:
            return within(directions[piece.place], route.forms[piece.place], piece)

        received = self._send(route.back, route.home, dtype, of, route.received[1], "directions")
        targets = [own[piece.place][1] for piece, _ in received]
        if targets:
            torch._foreach_copy_(targets, [value.view_as(target) for target, (_, value) in zip(targets, received)])

    def _send(
        self,
        out: Sequence[Sequence[Slice]],
        into: Sequence[Sequence[Slice]],
        dtype: torch.dtype,
        value: Callable[[Slice], Tensor],
        received: Sequence[int],
        kind: str,
    ) -> list[tuple[Slice, Tensor]]:
        """One all-to-all: pieces out to each rank, pieces in from each. Empty ones are left out of what came."""
        sent = [value(piece).reshape(-1) for pieces in out for piece in pieces if piece.numel]
        buffer = torch.cat(sent) if sent else torch.empty(0, dtype=dtype, device=self.storage.device)
        lengths = [[sum(p.numel for p in pieces) for pieces in side] for side in (out, into)]
        came = self.world.all_to_all(buffer, lengths[0], lengths[1], kind, received)
        pieces = [piece for some in into for piece in some if piece.numel]
        return list(zip(pieces, came.split([piece.numel for piece in pieces]))) if pieces else []

    def _segments(
        self, places: Sequence[int], vectors: Sequence[Tensor | None], fresh: frozenset[int]
    ) -> list[Segment]:
        """The segments of whole layers that this rank owns."""
        owners, found = self.storage.owners, list[Segment]()
        for outlines, layout, mine, vector in zip(self.outlines.of(places), owners.layouts, owners.mine, vectors):
            for outline in outlines:
                assert vector is not None
                begin = outline.start - layout.start[mine[0]]
                found.append(Segment(outline, vector[begin : begin + outline.numel], self.inputs, [], fresh))
        return found


def within(layer: Tensor, form: tuple[int, int, int], piece: Slice) -> Tensor:
    """A piece's numbers [outer, rows, inner] in those of its whole layer."""
    return layer.view(form).narrow(1, piece.start, piece.rows)
