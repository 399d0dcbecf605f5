"""A job between two steps as named tensors and plain values, and back again, on any number of ranks.

    model/NAME                  parameters, the same on every rank
    average/NAME                their running means
    optimizer/NAME/KEY          state of an optimizer by parameter; of our own each rank writes what it holds
    rank-R/...                  what every rank has of its own: buffers, the images that mixup will blend

Of what all ranks have alike, each writes its part; of what is cut over ranks, each writes what it has. Schedules, the
order of the samples and all draws are functions of the number of steps, so nothing else is needed to go on: on the
same ranks to the last bit, on others in meaning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.optim import SecondOrder
from natgrad.parallel import is_sharded, writes
from natgrad_lab.data.mixup import RunningMixup
from natgrad_lab.stored_names import renewed
from natgrad_lab.train import checkpoint
from natgrad_lab.train.json_tensors import pack, unpack
from natgrad_lab.train.loop import Job
from natgrad_lab.train.optimizers import Settings
from natgrad_lab.train.recipe import Recipe, described

Tensors = dict[str, Tensor]


def state_of(job: Job) -> tuple[Tensors, dict[str, Any]]:
    """What this rank is to write down, not copied, and what is no tensor."""
    alike: Tensors = {f"model/{name}": p for name, p in job.model.named_parameters()}
    alike |= {f"average/{name}": mean for name, mean in zip(_trained(job), job.average.means)}
    if isinstance(job.optimizer, SecondOrder):
        job.optimizer.settle()  # brings the numbers of groups up to date
    groups = [{k: v for k, v in group.items() if k != "params"} for group in job.optimizer.param_groups]
    values: dict[str, Any] = {
        "ranks": job.world.size,
        "steps": job.steps,
        "recipe": described(job.recipe),
        "groups": pack(groups, "optimizer/groups", alike),
        "scaler": None if job.scaler is None else job.scaler.state_dict(),
    }
    own = dict(_own(job))
    if isinstance(job.optimizer, SecondOrder):
        values["skipped"] = job.optimizer.skipped
        names, parts = _names(job), job.optimizer.distributed_state
        for place, states in (("", parts.held()), (f"rank-{job.world.rank}/", parts.apart())):
            for parameter, state in states.items():
                own |= {f"{place}optimizer/{names[parameter]}/{key}": value for key, value in state.items()}
    else:
        values["state"] = pack(job.optimizer.state_dict()["state"], "optimizer/state", alike)
    mine = {name: value for name, value in alike.items() if writes(value)}
    whole = sorted(name for name, value in alike.items() if not is_sharded(value))
    return {**own, **mine, **{name: alike[name] for name in whole[job.world.rank :: job.world.size]}}, values


def restore(job: Job, path: Path, changes: bool = False) -> None:
    """Bring a fresh job to where a checkpoint was written; ValueError where it is of another run."""
    values, table = checkpoint.read_values(path), checkpoint.contents(path)
    changed = check_same(path, values, job, changes)
    names = {f"model/{name}": p for name, p in job.model.named_parameters()}
    check_shapes(path, table, {**names, **{f"rank-0/buffers/{name}": b for name, b in _buffers(job).items()}})
    means = {f"average/{name}": mean for name, mean in zip(_trained(job), job.average.means)}
    if not means.keys() <= table.keys():
        raise ValueError(f"checkpoint {str(path)!r} has no running means of the weights; leave --average out")
    names |= means
    with torch.no_grad():
        cut = {name: tensor for name, tensor in names.items() if is_sharded(tensor)}
        for name, value in checkpoint.load(path, {name: table[name] for name in names}, cut).items():
            names[name].copy_(value)
    _restore_optimizer(job, path, values, table, changed)
    _restore_own(job, path, values["ranks"], table)
    if job.scaler is not None and values["scaler"] is not None:
        job.scaler.load_state_dict(values["scaler"])
    job.done, job.elapsed = values["step"], values["elapsed"]


def check_same(path: Path, values: Mapping[str, Any], job: Job, changes: bool) -> bool:
    """Refuse the checkpoint of another recipe, naming what differs, and a step that does not exist here.

    Return whether the recipe differs, which `changes` allows.
    """
    differing = check_recipe(path, values, job.recipe, changes)
    if values["steps"] != job.steps and not differing:
        raise ValueError(
            f"{job.world.size} ranks make {job.steps} steps of this run, {values['ranks']} made {values['steps']}: the "
            "last batch of an epoch has fewer samples than ranks; use fewer ranks"
        )
    if values["step"] > job.steps:
        raise ValueError(f"checkpoint {str(path)!r} has {values['step']} steps, this recipe ends after {job.steps}")
    return differing


def check_recipe(path: Path, values: Mapping[str, Any], recipe: Recipe, changes: bool) -> bool:
    """Refuse the checkpoint of another recipe, naming what differs. Return whether it differs, which `changes` allows.

    Neither data nor model are needed for it.
    """
    stored, now = without_free(renewed(values["recipe"])), _plain(without_free(described(recipe)))
    stored["optimizer"] = {**_added_since(stored["optimizer"], recipe.optimizer), **stored["optimizer"]}
    differing = list(differences(stored, now))
    if differing and not changes:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"checkpoint {str(path)!r} is of another recipe: {'; '.join(differing[:3])}{more}; use the command that "
            "began the run, or add --accept-changes to go on with the new values"
        )
    old, new = (one["optimizer"]["kind"] for one in (stored, now))
    if old != new:
        raise ValueError(
            f"checkpoint {str(path)!r} holds the state of {old}, not of {new}: begin anew without --resume"
        )
    return bool(differing)


def check_shapes(path: Path, table: Mapping[str, Any], here: Mapping[str, Tensor]) -> None:
    """Refuse the checkpoint of another network, naming what differs."""
    for name, tensor in here.items():
        if name not in table or table[name].size != tensor.shape:
            there = tuple(table[name].size) if name in table else "missing"
            own = name.removeprefix("rank-0/buffers/")
            raise ValueError(
                f"checkpoint {str(path)!r} is of another network: {own} is {there}, not {tuple(tensor.shape)}; use the "
                "command that began the run, or name another --out"
            )


def _added_since(stored: Mapping[str, Any], optimizer: Settings) -> dict[str, Any]:
    """Return the defaults of fields that the optimizer's settings did not have when the recipe was written."""
    known = fields(optimizer) if stored["kind"] == type(optimizer).__name__ else ()
    return {one.name: _plain(one.default) for one in known if one.name not in stored and one.default is not MISSING}


FREE = {"path", "workers"}
"""Fields that may differ between a run's beginning and its continuation: they say where and how, not what."""


def differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Name the fields in which two described recipes differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name.removesuffix('.kind')} was {old}, is {new}"


def without_free(recipe: Any) -> Any:
    """Return a described recipe without the fields that say where and how, not what."""
    if not isinstance(recipe, dict):
        return recipe
    return {key: without_free(value) for key, value in recipe.items() if key not in FREE}


def _plain(value: Any) -> Any:
    """Turn tuples into lists, as a file gives them back."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _trained(job: Job) -> list[str]:
    return [name for name, p in job.model.named_parameters() if p.requires_grad]


def _names(job: Job) -> dict[nn.Parameter, str]:
    return {p: name for name, p in job.model.named_parameters()}


def _buffers(job: Job) -> Tensors:
    """What the network's state has beside its parameters."""
    known = {name for name, _ in job.model.named_parameters(remove_duplicate=False)}
    beside = {name: value for name, value in job.model.state_dict().items() if name not in known}
    for name, value in beside.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name} of the network's state is a {type(value).__name__}, which no checkpoint holds; make it a "
                "tensor, or set --save-every 0"
            )
    return beside


def _own(job: Job) -> Iterator[tuple[str, Tensor]]:
    """What is this rank's alone."""
    here = f"rank-{job.world.rank}"
    for name, value in _buffers(job).items():
        yield f"{here}/buffers/{name}", value
    for part, mixup in job.regulariser.mixups.items():
        for name, value in zip(("inputs", "targets"), mixup.kept()):
            yield f"{here}/mixup/{name}/{part:06d}", value


def _restore_optimizer(
    job: Job, path: Path, values: Mapping[str, Any], table: Mapping[str, Any], changed: bool
) -> None:
    """changed: the numbers of the recipe count, not those of the checkpoint."""
    fresh = job.optimizer.state_dict()["param_groups"]
    loose = {name: table[name] for name in table if re.match("optimizer/(groups|state)/", name)}
    parameters = [p for group in job.optimizer.param_groups for p in group["params"]]
    common = checkpoint.load(path, loose, dict(_cut_alike(loose, parameters)))
    groups = []
    for group, saved in zip(fresh, unpack(values["groups"], common)):
        own = {*job.optimizer.defaults, "initial_lr"}
        set_by_recipe = {name: value for name, value in group.items() if changed and name in own}
        groups.append({**saved, **set_by_recipe, "params": group["params"]})
    if isinstance(job.optimizer, SecondOrder):
        job.optimizer.skipped = values["skipped"]
        state = _second_order_state(job, job.optimizer, path, table, values["ranks"] == job.world.size)
    else:
        state = unpack(values["state"], common)
    job.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _cut_alike(table: Mapping[str, Any], parameters: Sequence[nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """Of a plain optimizer's state the tensors that have their parameter's shape, where that is cut over ranks."""
    for name, entry in table.items():
        written = re.fullmatch(r"optimizer/state/(\d+)/[^/]+", name)
        if written and int(written[1]) < len(parameters):
            parameter = parameters[int(written[1])]
            if is_cut_like(parameter, entry.size):
                yield name, parameter.detach()


def is_cut_like(tensor: Tensor, size: Sequence[int]) -> bool:
    """Whether a saved tensor of this size can be read in the parts in which this one is cut over ranks."""
    return is_sharded(tensor) and tuple(size) == tuple(tensor.shape)


def _second_order_state(
    job: Job, optimizer: SecondOrder, path: Path, table: Mapping[str, Any], same: bool
) -> dict[int, dict[str, Tensor]]:
    """Return this rank's part of an optimizer's state, by the place of the parameter."""
    by_name = {name: p for p, name in _names(job).items()}
    there: dict[nn.Parameter, dict[str, str]] = {p: {} for p in by_name.values()}
    for prefix in ("", f"rank-{job.world.rank}/") if same else ("",):
        for name in table:
            written = re.fullmatch(f"{prefix}optimizer/(.+)/([^/]+)", name)
            if written and written[1] in by_name:
                there[by_name[written[1]]][written[2]] = name
    keys = optimizer.distributed_state.wanted(there)
    chosen = {there[p][key]: optimizer.state[p].get(key) for p, own in keys.items() for key in own}
    cut = {name: mine for name, mine in chosen.items() if mine is not None and is_cut_like(mine, table[name].size)}
    loaded = checkpoint.load(path, {name: table[name] for name in chosen}, cut)
    places = {p: k for k, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    return {places[p]: {key: loaded[there[p][key]] for key in chosen} for p, chosen in keys.items()}


def _restore_own(job: Job, path: Path, ranks: int, table: Mapping[str, Any]) -> None:
    """Take over what was each rank's alone: one's own on equal ranks, else an equal share of everybody's."""
    same = ranks == job.world.size
    sources = [job.world.rank] if same else range(ranks)
    chosen = {n: table[n] for rank in sources for n in sorted(table) if n.startswith(f"rank-{rank}/")}
    loaded = checkpoint.load(path, chosen)
    state = job.model.state_dict()
    for name, buffer in _buffers(job).items():
        found = [loaded[f"rank-{rank}/buffers/{name}"] for rank in sources]
        floats = len(found) > 1 and buffer.is_floating_point()
        state[name] = torch.stack(found).mean(0) if floats else found[0]
    job.model.load_state_dict(state)  # as modules want it: their state need not be buffers
    parts = {kind: [v for n, v in loaded.items() if f"/mixup/{kind}/" in n] for kind in ("inputs", "targets")}
    if not parts["inputs"] or not job.recipe.regularisation.mixup:
        return
    if not same:  # the whole batch in its order, shared out again
        whole = {kind: torch.cat(values) for kind, values in parts.items()}
        shares = {kind: value.tensor_split(job.world.size)[job.world.rank] for kind, value in whole.items()}
        parts = {kind: list(share.split(job.recipe.micro_batch or len(share))) for kind, share in shares.items()}
    for part, (inputs, targets) in enumerate(zip(parts["inputs"], parts["targets"])):
        mixup: RunningMixup = job.regulariser.mixups[part]
        mixup.take(inputs.to(job.device), targets.to(job.device))
