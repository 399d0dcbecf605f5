"""Nested values as JSON and named tensors: {"a": [x, 0.5]} becomes {"dict": [["a", {"list": [...]}]]} and tensor x."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

PLAIN = bool | int | float | str | None


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return `value` for JSON, with its tensors put into `tensors` under names that begin with `name`."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[pack(k, name, tensors), pack(v, f"{name}/{k}", tensors)] for k, v in value.items()]}
    for kind in (list, tuple):
        if type(value) is kind:
            return {kind.__name__: [pack(inner, f"{name}/{k}", tensors) for k, inner in enumerate(value)]}
    if isinstance(value, PLAIN):
        return value
    raise ValueError(f"{name} is a {type(value).__name__}, which no checkpoint holds: numbers, text, tensors and lists")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what `pack` was given."""
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {unpack(k, tensors): unpack(v, tensors) for k, v in inner}
    made = [unpack(one, tensors) for one in inner]
    return tuple(made) if kind == "tuple" else made
