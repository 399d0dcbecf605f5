"""Rows of samples of layers that are alike, as one tensor: what they are preconditioned with.

A measurement leaves the rows of each layer as tensors of their own in the optimizer's state. Before they are used,
those of layers of one form are put behind one another, and the state has views of that. Whoever measures or loads anew
puts other tensors there; then it is done again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natgrad.curvature.by_rows import ByRows
from natgrad.layer_state import LayerState


class RowGroup(NamedTuple):
    """Neighbouring layers of one form: their places among all cells, and what is kept of them, [layers, ...] each."""

    places: tuple[int, ...]
    kept: dict[str, Tensor]


class RowStacks:
    """The rows of some layers, neighbours with one curvature that a rank owns, in their order."""

    def __init__(self, cells: Mapping[int, LayerState]):
        self.cells = dict(cells)
        self._groups: list[RowGroup] = []
        self._dictionaries: list[dict[str, Any]] = []
        self._owns: list[dict[str, Any]] = []  # the dictionary, the key and the tensor of every entry that was joined
        self._keys: list[str] = []
        self._values: list[Any] = []

    def groups(self) -> list[RowGroup]:
        """The layers' rows and factors as they are now, group by group."""
        states = [cell.state() for cell in self.cells.values()]
        same = len(states) == len(self._dictionaries) and all(map(is_, states, self._dictionaries))
        if not same or not all(map(is_, map(dict.get, self._owns, self._keys), self._values)):
            self._join(states)
        return self._groups

    def _join(self, states: Sequence[dict[str, Any]]) -> None:
        self._groups, entries = [], list[tuple[dict[str, Any], str, Any]]()
        both = zip(self.cells.items(), states)
        for _, some in groupby(both, key=lambda one: form_of(*one[0][1:], one[1])):
            own = list(some)
            (_, cell), state = own[0]
            curvature, (key,) = cell.curvature, cell.keys
            assert isinstance(curvature, ByRows)
            names = {name: f"{key}_{name}" for name in curvature.stored}
            kept = {name: joined([s for _, s in own], full) for name, full in names.items() if full in state}
            kept[key] = together([s[f"{key}_inverse"] for _, s in own])
            self._groups.append(RowGroup(tuple(k for (k, _), _ in own), kept))
            entries += [(s, full, s.get(full)) for _, s in own for full in (*names.values(), f"{key}_inverse")]
        self._dictionaries = list(states)
        self._owns = [own for own, _, _ in entries]
        self._keys, self._values = [key for _, key, _ in entries], [value for *_, value in entries]


def form_of(cell: LayerState, state: Mapping[str, Any]) -> Any:
    """What layers have in common whose rows can be joined."""
    (key,), curvature = cell.keys, cell.curvature
    assert isinstance(curvature, ByRows)
    kept = [(name, state.get(f"{key}_{name}")) for name in (*curvature.stored, "inverse")]
    return curvature, cell.layer.shape, [(name, v.shape, v.dtype, v.device) for name, v in kept if v is not None]


def joined(states: Sequence[dict[str, Any]], name: str) -> Tensor:
    """The tensors of a name behind one another; the states have views of them from now on."""
    if len(states) == 1:
        return states[0][name].unsqueeze(0)
    whole = torch.stack([state[name] for state in states])
    for state, view in zip(states, whole.unbind()):
        state[name] = view
    return whole


def together(factors: Sequence[Tensor]) -> Tensor:
    """Factors [1, n, n] as one tensor [layers, 1, n, n], without a copy where they lie behind one another."""
    first = factors[0]
    apart = first.numel()
    for k, one in enumerate(factors):
        same = one.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and one.stride() == first.stride()
        if not same or one.storage_offset() != first.storage_offset() + k * apart:
            return torch.stack(list(factors))
    return first.as_strided((len(factors), *first.shape), (apart, *first.stride()), first.storage_offset())
