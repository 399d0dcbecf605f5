"""Parameters in groups: in any of the forms that torch's optimizers take, and the usual two for weight decay."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)


def decay_groups(model: nn.Module, weight_decay: float, **numbers: float) -> list[dict[str, Any]]:
    """Two groups for `params=`: matrices, which decay, and biases, normalisations and other vectors, which do not.

    Frozen parameters are in a group too, so that they may train later. A group without parameters is left out.

    Args:
        model: the network whose parameters are divided.
        weight_decay: of the matrices.
        **numbers: what both groups have (lr, momentum, damping, refresh).

    Returns:
        Groups for `params=` of an optimizer.

    """
    norms = {p for module in model.modules() if isinstance(module, NORMS) for p in module.parameters(recurse=False)}
    parts: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in model.parameters():
        parts[parameter.dim() < 2 or parameter in norms].append(parameter)
    decays = (weight_decay, 0.0)
    return [{"params": own, "weight_decay": decay, **numbers} for own, decay in zip(parts, decays) if own]


def as_groups(params: Sequence[Any]) -> list[dict[str, Any]]:
    """`params=` as groups of lists of parameters: of parameters, (name, parameter) pairs, or groups of either.

    Names are not kept: the model has them.
    """
    groups = list(params) if params and isinstance(params[0], dict) else [{"params": list(params)}]
    return [{**group, "params": parameters_in(group["params"])} for group in groups]


def parameters_in(given: Tensor | Iterable[Any]) -> list[Any]:
    """Parameters, of which each may have its name before it."""
    if isinstance(given, Tensor):
        return [given]
    return [one[1] if isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], str) else one for one in given]


def plain_numbers(group: dict[str, Any], names: Iterable[str]) -> None:
    """Turn numbers of other libraries into Python's: `torch.load` refuses a checkpoint that holds NumPy's."""
    for name in names:
        value = group.get(name)
        if type(value) not in (float, int, bool) and isinstance(value, numbers.Real):
            group[name] = int(value) if isinstance(value, numbers.Integral) else float(value)
