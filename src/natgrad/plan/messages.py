"""What one step sends, message by message, in the order of a step (docs/design.md, "One step").

The ghost's `World` groups tensors by type and owner and counts their bytes, triangles and all, as it does in training;
nothing is packed, because there are no numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from natgrad.budget import OF_A_LAYER, OF_A_STATISTIC
from natgrad.cell import Cell
from natgrad.curvature import SampleSpace
from natgrad.curvature.base import part_of
from natgrad.curvature.rowwork import Form, sent
from natgrad.optim import SecondOrder
from natgrad.optim.conjugate import Conjugate
from natgrad.optim.lengths import Remembers
from natgrad.optim.search import CurvatureStep
from natgrad.parallel import Parcel, World
from natgrad.plan.ghost import Built, Message
from natgrad.preconditioner import SEEN_BY_LAYER, SEEN_BY_STEP

FormOf = Callable[[Cell], Form]


class Step:
    """Sends one step of an optimizer through its silent world."""

    def __init__(self, built: Built, form_of: FormOf):
        self.built, self.form_of, self.world, self.ghost = built, form_of, built.world, built.ghost

    def send(self, model: nn.Module, fresh: bool) -> tuple[list[Message], dict[str, int]]:
        """Every message, and what `World.sent` counts on this rank by kind. fresh: everything is measured."""
        self.world.sent.clear()
        self.ghost.log.clear()
        if self.world.size > 1:
            optimizer = self.built.second
            if optimizer is None:
                self._name("gradients")
                self.world.mean([torch.empty_like(p) for p in model.parameters()], "gradients")
            else:
                self._curved(optimizer, fresh)
        return list(self.ghost.log), {k: v for k, v in self.world.sent.items() if v}

    def _name(self, kind: str) -> str:
        self.ghost.kind = kind
        return kind

    def _spread(self, how: str, parcels: Sequence[Parcel], kind: str) -> None:
        """A reduction to owners or a gathering from them: one message a data type (World.begin, World._gather)."""
        if not self.world.owners:
            if how == "reduce_scatter":
                self.world.count(kind, parcels)
                self.ghost.tell("all_reduce", kind, [sum(self._bytes(p) for p in parcels)])
            return
        self.world.count(kind, parcels)
        for chunks in self.world._by_owner(parcels):
            self.ghost.tell(how, kind, [sum(self._bytes(parcels[k]) for k in chunk) for chunk in chunks])

    def _bytes(self, parcel: Parcel) -> int:
        return self.world._numel(parcel) * parcel.tensor.element_size()

    def _numbers(self, count: int, dtype: torch.dtype = torch.float64) -> None:
        """One small sum or maximum."""
        if count:
            self.world.max([torch.zeros(count, dtype=dtype)], self._name("scalars"))

    def _curved(self, optimizer: SecondOrder, fresh: bool) -> None:
        cells = optimizer.cells
        parameters = [p for c in cells for p in c.layer.parameters]
        keys = [(c, m.key) for c in cells for m in c.curvature.statistics]
        self._numbers(1 + 3 * len(cells))  # finite? who has a gradient, is half frozen, has lost its curvature
        if fresh and keys and self.world.gradients == "auto":
            self._numbers(2)
            self._numbers(2 * marks(parameters))
        if self.world.gradients != "averaged":
            self._gradients(optimizer, parameters)
        if fresh and keys:
            layers = len({c.name for c, _ in keys})
            counted = 0 if optimizer.purse is None else OF_A_LAYER * layers + OF_A_STATISTIC * len(keys)
            self._numbers(SEEN_BY_STEP + len(keys) + SEEN_BY_LAYER * layers + counted)
            self._moments(cells)
            self._rows([c for c in cells if c.by_rows])
            self._numbers(len(keys), torch.int64)
            self._inverses([c for c in cells if c.split])
        self._directions(optimizer, fresh)
        self._weights(optimizer, parameters)

    def _gradients(self, optimizer: SecondOrder, parameters: Sequence[nn.Parameter]) -> None:
        owners = {p: c.owner for c in optimizer.cells for p in c.layer.parameters}
        parcels = [Parcel(torch.empty_like(p), owners[p]) for p in parameters]
        self._spread("reduce_scatter", parcels, "gradients")

    def _moments(self, cells: Sequence[Cell]) -> None:
        parcels = [
            Parcel(nothing(c, m.shape(c.layer)), c.holders[m.key], m.symmetric)
            for c in cells
            if not c.by_rows
            for m in c.curvature.statistics
        ]
        if parcels and self.world.wire is not None:
            if self.world.wire == torch.float16:
                self._numbers(len(parcels))
            parcels = [p._replace(tensor=torch.empty_like(p.tensor, dtype=self.world.wire)) for p in parcels]
        if parcels:
            self._spread("reduce_scatter", parcels, "statistics")

    def _rows(self, cells: Sequence[Cell]) -> None:
        """Rows of every rank to every owner, or to all where there are no owners."""
        local = any(c.curvature.legacy is not None and c.curvature.legacy.local for c in cells)  # type: ignore[union-attr]
        if not cells:
            return
        self._numbers(3 * len(cells), torch.int64)
        if local:
            return
        size, rank, owners = self.world.size, self.world.rank, self.world.owners
        self._numbers(len(cells) * size, torch.int64)
        received = [0] * size
        for cell in cells:
            form = self.form_of(cell)
            own = quota(form.samples, rank, size)
            if not owners or cell.owner != rank:
                self.world.sent["statistics"] += narrowed(form, own, self.world)
            received[cell.owner if owners else rank] += narrowed(form, form.samples, self.world)
        self.ghost.tell("exchange" if owners else "all_gather", "statistics", received)

    def _inverses(self, cells: Sequence[Cell]) -> None:
        """Traces of layers that are split over ranks, and their smaller inverses on their way to the owners."""
        moments = [(c, m, m.shape(c.layer)) for c in cells for m in c.curvature.statistics]
        self._numbers(sum(shape[0] for _, _, shape in moments), torch.float32)
        away = [(c, m, shape) for c, m, shape in moments if c.holders[m.key] != c.owner]
        made = [nothing(c, c.curvature.inverse_shape(shape)) for c, _, shape in away]
        parcels = [Parcel(t, c.owner, m.symmetric) for t, (c, m, _) in zip(made, away)]
        self.world.count("inverses", parcels)
        received = [0] * self.world.size
        for parcel in parcels:
            received[parcel.owner] += self._bytes(parcel)
        self.ghost.tell("exchange", "inverses", received)

    def _directions(self, optimizer: SecondOrder, fresh: bool) -> None:
        """The few numbers by which ranks agree on a direction and its length."""
        self._numbers(int(optimizer.gradients.max_norm is not None and self.world.owners))
        if fresh and optimizer.engine.cells and self.world.gradients != "averaged":
            self._numbers(2 * int(any(c.curvature.statistics for c in optimizer.cells)))  # for the noise scale
        spaces = [c for c in optimizer.cells if isinstance(c.curvature, SampleSpace)]
        if spaces and spaces[0].curvature.joint:
            samples = self.form_of(spaces[0]).samples
            if fresh:
                self._numbers(2, torch.int64)
                if self.world.owners:
                    self.world.max([spaces[0].zeros((samples, samples))], self._name("statistics"))
            self._numbers((samples + 2) * self.world.owners, torch.float32)
        if optimizer.engine.local:
            directions = [c.zeros(c.layer.shape) for c in optimizer.cells]
            self.world.mean(directions, self._name("directions"))
        for count in conjugate_sums(optimizer):
            self._numbers(count)
        if isinstance(optimizer.length, Remembers):
            self._numbers(optimizer.length.sums * self.world.owners)

    def _weights(self, optimizer: SecondOrder, parameters: Sequence[nn.Parameter]) -> None:
        owners = {p: c.owner for c in optimizer.cells for p in c.layer.parameters}
        tensors = [torch.empty_like(p, dtype=self.world.weights or p.dtype) for p in parameters]
        self._spread("all_gather", [Parcel(t, owners[p]) for t, p in zip(tensors, parameters)], optimizer.gather)
        if isinstance(getattr(optimizer, "search", None), CurvatureStep):
            self._numbers(3)


def nothing(cell: Cell, shape: Sequence[int]) -> Tensor:
    """A tensor of this shape in the statistics' precision."""
    return torch.empty(tuple(shape), dtype=cell.zeros((), device="meta").dtype, device="meta")


def quota(samples: int, rank: int, size: int) -> int:
    """How many rows a rank has of `samples` (sampling.Sampler.quota)."""
    own = samples * (rank + 1) // size - samples * rank // size
    return min(own, part_of(samples, size))


def narrowed(form: Form, samples: int, world: World) -> int:
    """Bytes of so many rows on the wire: in half precision, with each sample's largest entry, if asked for."""
    if world.wire is None:
        return sent(form, samples)
    parts = 1 if form.columns or form.token_bytes else 2
    return samples * (2 * form.numbers + 4 * parts + 4 + form.token_bytes)


def marks(parameters: Sequence[nn.Parameter]) -> int:
    """How many numbers ranks compare to see whether gradients are averaged already (Gradients.agree)."""
    return sum(len(range(0, p.numel(), max(1, p.numel() // 16))) + 1 for p in parameters) + 1


def conjugate_sums(optimizer: SecondOrder) -> list[int]:
    """How many numbers the two messages of conjugate directions have, after the first step."""
    rule = optimizer.rule
    if not isinstance(rule, Conjugate):
        return []
    learns = rule.metric.sums if rule.metric is not None and rule.metric.secant else 0
    told = 2 if rule.search.feedback is not None else 0
    asked = bool(rule.needs & {"qy", "yqy"}) + ("yqy" in rule.needs)
    return [learns + ("gz" in rule.needs) + told, 2 + asked]


def bytes_by_kind(messages: Sequence[Message]) -> Mapping[str, int]:
    """The payload of these messages by kind."""
    found: dict[str, int] = {}
    for message in messages:
        found[message.kind] = found.get(message.kind, 0) + message.payload
    return found
