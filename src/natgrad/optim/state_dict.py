"""Saving and loading: state dictionaries of the form that torch's trainers expect, checked before anything changes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.layer_state import LayerState
from natgrad.layers import UncurvedParameter
from natgrad.layers.shards import Cut
from natgrad.parallel import OwnedTensor, Sharding, World, is_sharded, like, writes

DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64)


class DistributedState:
    """The state of an optimizer of which every rank holds a part.

    Args:
        cells: the layers of all ranks.
        state: this rank's part, by parameter.
        groups: the optimizer's param_groups.
        world: the ranks.
        fresh: a new state of a layer by parameter, as a rank holds it; None: as any of them does.
        local: whether each rank goes by rows of its own.
        sharding: how the model's parameters are cut over ranks, where they are.

    """

    def __init__(
        self,
        cells: Sequence[LayerState],
        state: Mapping[Any, dict[str, Any]],
        groups: Sequence[dict[str, Any]],
        world: World,
        fresh: Callable[[LayerState, int | None], dict[nn.Parameter, dict[str, Any]]],
        local: bool,
        sharding: Sharding | None = None,
    ):
        self.cells, self.state, self.groups, self.world = cells, state, groups, world
        self.fresh, self.local, self.sharding = fresh, local, sharding
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]

    def saved(self, saved: Mapping[str, Any]) -> dict[nn.Parameter, dict[str, Any]]:
        """A saved state by parameter, in the form in which the parameters' layers keep it (`LayerState.packed`).

        Raises:
            ValueError: the state is of another model or another optimizer.

        """
        if not {"state", "param_groups"} <= saved.keys():
            raise ValueError(
                f"not an optimizer's state_dict: it has {sorted(map(str, saved))}, not state and param_groups"
            )
        sizes = [len(g["params"]) for g in saved["param_groups"]], [len(g["params"]) for g in self.groups]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"this state_dict is of another model or other groups: it has groups of {sizes[0]} parameters, "
                f"this optimizer of {sizes[1]}"
            )
        found: dict[nn.Parameter, dict[str, Any]] = {}
        cells = {parameter: cell for cell in self.cells for parameter in cell.layer.parameters}
        fixed = self.without_rows()
        for parameter, theirs in self._pairs(saved):
            mine = fixed.get(parameter, {})
            if was_loosened(mine, theirs):
                found[parameter] = dict(theirs)
                continue
            theirs = found[parameter] = converted(theirs, mine, cells.get(parameter))
            missing = sorted(key for key in mine if key not in theirs and not dispensable(key))
            if missing and not self._is_part(parameter, theirs):
                raise ValueError(
                    f"this state_dict lacks {', '.join(missing)} of a parameter of shape {tuple(parameter.shape)}: it "
                    "is of another optimizer"
                )
            for key, value in mine.items():
                if key in theirs and isinstance(value, Tensor) and value.shape != theirs[key].shape:
                    raise ValueError(
                        f"this state_dict is of another model: its {key} has shape {tuple(theirs[key].shape)}, "
                        f"here it is {tuple(value.shape)}"
                    )
        return found

    @cached_property
    def _everywhere(self) -> dict[nn.Parameter, set[str]]:
        """What every rank has of each parameter."""
        return {p: needed(state) for cell in self.cells for p, state in self.fresh(cell, NOBODY).items()}

    def _is_part(self, parameter: nn.Parameter, theirs: Mapping[str, Any]) -> bool:
        """Whether a saved state of a parameter is what every rank has of it, and nothing of what its owner has."""
        return needed(theirs) == self._everywhere[parameter]

    def _pairs(self, saved: Mapping[str, Any]) -> Iterator[tuple[nn.Parameter, Mapping[str, Any]]]:
        """(parameter, its saved state) for every parameter."""
        ids = [k for g in saved["param_groups"] for k in g["params"]]
        for parameter, k in zip(self.parameters, ids):
            yield parameter, saved["state"].get(k, {})

    def loosened(self, theirs: Mapping[nn.Parameter, Mapping[str, Any]]) -> list[int]:
        """The places of layers that had lost their curvature in the run that was saved."""
        weights = [cell.layer.parameters[0] for cell in self.cells]
        return [k for k, w in enumerate(weights) if w in theirs and was_loosened(self.state[w], theirs[w])]

    def copies(
        self, theirs: Mapping[nn.Parameter, Mapping[str, Any]]
    ) -> tuple[dict[Any, dict[str, Any]], set[nn.Parameter]]:
        """New tensors of this rank with the values of `saved()`, each in the type and on the device it has here.

        torch's own loading casts everything to the parameter's type, which would round curvature in bf16 models and
        turn clocks into floats. Also returns the parameters that this rank owns and of which only another rank's part
        was saved: what their owner keeps begins anew.
        """
        fixed = self.without_rows()
        parts = {p for p, own in theirs.items() if needed(fixed[p]) > self._everywhere[p] and self._is_part(p, own)}
        cells = {cell for cell in self.cells if not parts.isdisjoint(cell.layer.parameters)}
        anew = {p: state for cell in cells for p, state in self.fresh(cell, self.world.rank).items() if p in parts}
        found = {
            parameter: {
                key: _like(theirs[parameter].get(key, anew.get(parameter, mine).get(key, value)), value)
                for key, value in mine.items()
            }
            for parameter, mine in fixed.items()
        }
        for cell in self.cells:
            weight = cell.layer.parameters[0]
            if cell.by_rows and cell.owner == self.world.rank:
                own = {key: value for key, value in theirs[weight].items() if key in cell.row_names}
                found[weight] |= {key: value.detach().to(weight.device, copy=True) for key, value in own.items()}
        return found, parts

    def without_rows(self) -> dict[Any, dict[str, Any]]:
        """What this rank holds, without what has the shape of the last measurement."""
        rows: dict[Any, frozenset[str]] = {cell.layer.parameters[0]: cell.row_names for cell in self.cells}
        return {
            parameter: {key: value for key, value in state.items() if key not in rows.get(parameter, ())}
            for parameter, state in self.state.items()
        }

    def whole(self) -> dict[nn.Parameter, dict[str, Any]]:
        """Every parameter's state as its owner holds it, on every rank. All ranks must call it."""
        whole: dict[nn.Parameter, dict[str, Any]] = {}
        parcels = []
        for cell in self.cells:
            for parameter, fresh in self.fresh(cell, None).items():
                whole[parameter] = fresh
                for key, value in fresh.items():
                    mine = self.state[parameter].get(key)
                    if self.sharding is not None and isinstance(mine, Tensor) and is_sharded(mine):
                        shape = mine.shape if key == "master" else cell.layer.shape
                        fresh[key], parts = self.sharding.parts(mine, shape)
                        parcels += parts
                        continue
                    if cell.place_of(key) == self.world.rank:
                        value.copy_(self.state[parameter][key])
                    parcels.append(OwnedTensor(value, cell.place_of(key)))
        parcels += self._rows(whole)
        self.world.gather(parcels)
        return whole

    def numbered(self) -> dict[int, dict[str, Any]]:
        """`whole` by the number of each parameter, as torch saves it. All ranks must call it."""
        whole = self.whole()
        return {k: whole[p] for k, p in enumerate(self.parameters)}

    def _rows(self, whole: dict[nn.Parameter, dict[str, Any]]) -> list[OwnedTensor]:
        """Room in `whole` for everybody's rows, whose shapes one small message tells, filled where they are."""
        cells = [cell for cell in self.cells if cell.by_rows]
        names = sorted(cells[0].row_names) if cells else []
        forms = torch.zeros(len(cells), len(names), 6, dtype=torch.int64)
        for cell, form in zip(cells, forms):
            for name, entry in zip(names, form):
                value = cell.state().get(name)
                if value is not None:
                    entry[: 2 + value.dim()] = torch.tensor([value.dim(), DTYPES.index(value.dtype), *value.shape])
        self.world.max([forms], "scalars")
        parcels = []
        for cell, form in zip(cells, forms.tolist()):
            weight = cell.layer.parameters[0]
            for name, (dimensions, dtype, *shape) in zip(names, form):
                if dimensions == 0:
                    continue
                mine = cell.state().get(name)
                value = torch.zeros(shape[:dimensions], dtype=DTYPES[dtype], device=weight.device)
                whole[weight][name] = value if mine is None else value.copy_(mine)
                parcels.append(OwnedTensor(whole[weight][name], cell.owner))
        return parcels

    def squares(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """A state_dict with symmetric matrices as squares [b, n, n]; `load_state_dict` takes it too."""
        cells = {cell.layer.parameters[0]: cell for cell in self.cells}
        state = dict(saved["state"])
        ids = [k for group in saved["param_groups"] for k in group["params"]]
        for parameter, k in zip(self.parameters, ids):
            if parameter in cells and k in state:
                state[k] = {key: cells[parameter].square(key, value) for key, value in state[k].items()}
        return {**saved, "state": state}

    def held(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """What this rank is to write down: of all ranks together every tensor once, of one that is cut every part."""
        rank, parts = self.world.rank, {}
        elsewhere = self.apart()
        for cell in self.cells:
            for parameter in cell.layer.parameters:
                state = {k: v for k, v in self.state[parameter].items() if k not in elsewhere.get(parameter, ())}
                places = {key: cell.place_of(key) if self.world.owners else 0 for key in state}
                parts[parameter] = {
                    key: value
                    for key, value in state.items()
                    if (writes(value) if is_sharded(value) else places[key] == rank)
                }
        return parts

    def apart(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """What is another one on every rank: rows, where each rank goes by its own."""
        if not self.local:
            return {}
        rows = {cell.layer.parameters[0]: cell.row_names for cell in self.cells}
        return {p: {k: v for k, v in self.state[p].items() if k in names} for p, names in rows.items()}

    def wanted(self, written: Mapping[nn.Parameter, Collection[str]]) -> dict[nn.Parameter, set[str]]:
        """The keys that this rank needs of what was written by any number of ranks, to go on from there."""
        keys: dict[nn.Parameter, set[str]] = {}
        fixed = self.without_rows()
        for cell in self.cells:
            for parameter in cell.layer.parameters:
                there = set(written.get(parameter, ()))
                mine = fixed[parameter].keys() | (cell.row_names if cell.owner == self.world.rank else set())
                keys[parameter] = there if was_loosened(fixed[parameter], dict.fromkeys(there)) else there & mine
        return keys


def converted(theirs: Mapping[str, Any], mine: Mapping[str, Any], cell: LayerState | None) -> dict[str, Any]:
    """A parameter's saved state in the form of this version.

    Earlier ones saved squares of symmetric matrices, and of parameters without curvature vectors as one row and the
    last direction, where `stretch` is enough now: these look back again from their next step on. Vectors of a layer
    have another shape where the layer is cut over ranks and its W has no dimension that is cut.
    """
    found = {key: value if cell is None else cell.packed(key, value) for key, value in theirs.items()}
    for key, value in found.items():
        here = mine.get(key)
        if cell is None or not isinstance(value, Tensor) or not isinstance(here, Tensor) or value.shape == here.shape:
            continue
        flat = isinstance(cell.layer, UncurvedParameter) and value.shape == (1, 1, cell.layer.numel)
        shapes = [tuple(cell.layer.shape), Cut(cell.layer).shape]  # of a plain model, of one that is cut over ranks
        if flat or (tuple(value.shape) in shapes and tuple(here.shape) in shapes):
            found[key] = value.reshape(here.shape)
    if "stretch" in mine and "last" in found and "stretch" not in found:
        found |= {key: torch.zeros_like(mine[key]) for key in ("stretch", "went")}
    return found


NOBODY = -1
"""A rank that owns nothing."""


def needed(state: Iterable[str]) -> set[str]:
    """The names in a state that it cannot be loaded without."""
    return {key for key in state if not dispensable(key)}


def dispensable(key: str) -> bool:
    """Whether a state can be loaded without: a master is its weight, and what statistics take is counted again."""
    return key in ("master", "passes") or key.endswith("_budget")


def was_loosened(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether the saved layer had been found never to be called: it has no clocks, but the fallback's state (or,
    where another rank owns it, nothing but its steps).
    """
    clocks = [key for key in mine if key.endswith("_clock")]
    trained = "nlcg_" if any(key.startswith("nlcg_") for key in mine) else "adam_"  # what this optimizer leaves
    loose = theirs.keys() <= {"step", "master", "scalars"} or any(key.startswith(trained) for key in theirs)
    return bool(clocks) and "step" in theirs and not any(key in theirs for key in clocks) and loose


def asked_by_checkpoint() -> bool:
    """Whether torch.distributed.checkpoint called the function that asks this, and joins what all ranks have.

    With full_state_dict=True it does not: one rank's state is all that it keeps. torch calls as anybody does, so its
    frame is looked at: the module, and the options that it goes by.
    """
    own = inspect.currentframe()
    caller = own and own.f_back and own.f_back.f_back
    if not caller or not caller.f_globals.get("__name__", "").startswith("torch.distributed.checkpoint."):
        return False
    return not getattr(caller.f_locals.get("info"), "full_state_dict", False)


def carried(fresh: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """A new state with the values that an earlier one has for it, in the type and on the device of the new one."""
    result = dict(fresh)
    for key, value in fresh.items():
        old = before.get(key)
        if not isinstance(old, Tensor) or not isinstance(value, Tensor):
            continue
        if old.shape == value.shape or (is_sharded(value) and old.numel() == value.numel()):
            result[key] = _like(old, value)
    return result


def _like(value: Any, mine: Any) -> Any:
    if is_sharded(mine):
        return like(value, mine)
    if is_sharded(value):
        raise ValueError(
            f"a saved state of shape {tuple(value.shape)} is cut over ranks, and this optimizer's model is not: load "
            "it with torch.distributed.checkpoint, or from gather_state_dict()"
        )
    if isinstance(value, Tensor) and isinstance(mine, Tensor):
        return value.detach().to(device=mine.device, dtype=mine.dtype, copy=True)
    return value
