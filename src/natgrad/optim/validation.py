"""What users hand in, checked: one line that names the value and the way out."""

from __future__ import annotations

import difflib
import math
import numbers
import sys
import warnings
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from natgrad.layers import FoundLayer
from natgrad.optim.param_groups import as_groups
from natgrad.parallel import World, reshard


class NatgradWarning(UserWarning):
    """Something that natgrad does other than a user might think."""


ELSEWHERE = {
    "betas": "momentum= is the first of them",
    "eps": "damping= takes its place",
    "nesterov": "rule=Momentum(...) says how directions are repeated",
    "dampening": "rule=Momentum(...) says how directions are repeated",
    "foreach": "steps are foreach already",
    "fused": "steps are foreach already",
    "capturable": "the learning rate is read on the host",
    "maximize": "negate the loss",
    "no_deprecation_warning": "leave it out",
}
"""Arguments of torch's optimizers, and what to do here."""


def warn(message: str) -> None:
    """A warning that names the user's line: the first one outside of natgrad and torch."""
    level, frame = 1, sys._getframe(0)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("natgrad", "torch"):
        if frame.f_back is None:
            break
        level, frame = level + 1, frame.f_back
    warnings.warn(message, NatgradWarning, stacklevel=level)


def known(kind: str, options: Collection[str], allowed: Collection[str], elsewhere: Mapping[str, str]) -> None:
    """Refuse arguments that an optimizer does not have. `elsewhere`: what to do instead, by argument."""
    for name in options:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, 1)
            hint = (
                elsewhere.get(name)
                or ELSEWHERE.get(name)
                or (f"did you mean {near[0]}=?" if near else "see its docstring")
            )
            raise TypeError(f"{kind}() has no argument {name!r}: {hint}")


def batch_dims(value: Any) -> None:
    """Where samples are in inputs: a dimension, or dimensions by the names of modules."""
    if value is None or (isinstance(value, Mapping) and all(isinstance(k, str) for k in value)):
        dims = [] if value is None else list(value.values())
    else:
        dims = [value]
    for dim in dims:
        if not isinstance(dim, int) or isinstance(dim, bool) or dim < 0:
            raise ValueError(f"batch_dim={value!r}: give the dimension of samples (0 or more), or {{module name: it}}")


def scope_of(params: Sequence[Any]) -> dict[Any, int]:
    """The group of every parameter that `params=` names, frozen ones too."""
    return {parameter: place for place, group in enumerate(as_groups(params)) for parameter in group["params"]}


def regroup(model: nn.Module, groups: list[dict[str, Any]], scope: Mapping[nn.Parameter, int] | None) -> None:
    """Bring groups up to date with a model: what trains now is in them, new parameters in the first (or as given)."""
    checked = groups_of(model, None)
    trained = [p for group in checked for p in group["params"] if scope is None or p in scope]
    if not trained:
        raise ValueError(f"{type(model).__name__} has no trainable parameters: unfreeze what is to be trained")
    places = {p: k for k, group in enumerate(groups) for p in group["params"]}
    for group in groups:
        group["params"] = []
    for parameter in trained:
        place = places.get(parameter, 0 if scope is None else min(scope[parameter], len(groups) - 1))
        groups[place]["params"].append(parameter)
    groups[:] = [group for group in groups if group["params"]]


def plain_model(model: Any) -> nn.Module:
    """The user's module, without the wrappers of DistributedDataParallel and torch.compile."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"got {type(model).__name__} where the model belongs: pass the model itself, as in SPNGD(model, lr=...); "
            "parameters, named parameters and groups go in params="
        )
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            break
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"{name or 'the model'} is wrapped in FullyShardedDataParallel, FSDP1, which natgrad does not support: "
                "use fully_shard(model) of torch.distributed.fsdp (FSDP2), or DistributedDataParallel"
            )
    reshard(model)
    return model


def same_model(model: nn.Module, world: World) -> None:
    """Refuse ranks that train unlike parameters, as the stages of a pipeline do."""
    known = [(name, p) for name, p in model.named_parameters() if not is_lazy(p)]
    forms = "; ".join(f"{name} {tuple(p.shape)} {p.dtype}" for name, p in known)
    mark = float(zlib.crc32(forms.encode()))
    ends = torch.tensor([mark, -mark], dtype=torch.float64)
    world.max([ends], "start")
    if ends[0] != -ends[1]:
        raise ValueError(
            "ranks train models with unlike parameters, as the stages of a pipeline are: natgrad does not split layers "
            "over a pipeline; build an optimizer for each stage with world=World(a process group of the ranks that "
            "hold this stage)"
        )


def of_shards(reasons: Mapping[str, bool], world: World) -> None:
    """Refuse choices that do not work where every rank has parts of the layers (fully_shard)."""
    of_ranks = {
        "World(owners=False)": not world.owners,
        "World(overlap=True)": world.overlap,
        "World(weights=)": world.weights is not None,
        'World(gradients="local")': world.gradients == "local",
    }
    for reason, holds in (*reasons.items(), *of_ranks.items()):
        if holds:
            raise ValueError(f"{reason} does not work on a model that fully_shard has cut; leave it out")


def groups_of(model: nn.Module, params: Iterable | None) -> list[dict[str, Any]]:
    """`params` (in any of torch's forms; None: all of the model's) as groups of trainable parameters."""
    groups = as_groups(list(model.parameters()) if params is None else list(params))
    known = set(model.parameters())
    result = []
    for group in groups:
        own = group["params"]
        if any(p not in known for p in own):
            raise ValueError("params= has a parameter that is not the model's: take them from the model that is passed")
        trained = [p for p in own if p.requires_grad]
        if trained:
            result.append({**group, "params": trained})
    return result


def check_group(group: dict[str, Any]) -> None:
    """The numbers of one parameter group."""
    for key, below in (("lr", math.inf), ("weight_decay", math.inf), ("momentum", 1.0)):
        between(key, group[key], 0, below)
    above("damping", group["damping"], 0)
    if group.get("refresh") is not None:
        whole("refresh", group["refresh"], 1)


def check_start(lr: Any, model: nn.Module, groups: list) -> None:
    """What must hold when an optimizer is built. Later a schedule may take lr to 0, at the start it may not be."""
    above("lr", lr, 0)
    if not groups:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameters: set requires_grad=True on what is to be trained"
        )


def no_loose(found: Iterable[FoundLayer], strict: bool) -> None:
    """With `strict`, every parameter must have curvature."""
    loose = [f"{f.name} ({f.why})" for f in found if f.why]
    if strict and loose:
        raise ValueError(
            f"strict=True, but no curvature is known for {'; '.join(loose)}: register their layers or leave strict off"
        )


def is_number(name: str, value: Any) -> bool:
    """Whether a value is a real number; a tensor is refused, because what it holds is read on the host."""
    if isinstance(value, Tensor):
        raise ValueError(f"{name}={value!r}: give a float, as {name}.item(); schedulers change it in param_groups")
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def above(name: str, value: Any, least: float) -> None:
    """A finite number above `least`."""
    if not is_number(name, value) or not least < value < math.inf:
        raise ValueError(f"{name}={value!r}: give a number above {least:g}")


def between(name: str, value: Any, least: float, below: float) -> None:
    """A number of at least `least` and below `below`."""
    if not is_number(name, value) or not least <= value < below:
        raise ValueError(
            f"{name}={value!r}: give a number of at least {least:g}"
            + (f" and below {below:g}" if below < math.inf else "")
        )


def one_of(name: str, value: Any, allowed: tuple) -> None:
    """A value of a closed set."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: give one of {', '.join(map(repr, allowed))}")


def function(name: str, value: Any) -> None:
    """A function, or None; what `step()` takes first is easily taken for the loss."""
    if value is not None and not callable(value):
        raise ValueError(
            f"step({type(value).__name__}): {name}= is a function that computes the loss, passes backward and returns "
            "the loss. Call backward() on a loss, then step(loss=loss) or step()"
        )


def whole(name: str, value: Any, least: int, none: bool = False) -> None:
    """A whole number of at least `least`, or None where that is allowed."""
    if (none and value is None) or (isinstance(value, int) and not isinstance(value, bool) and value >= least):
        return
    raise ValueError(f"{name}={value!r}: give a whole number of at least {least}{' or None' if none else ''}")
