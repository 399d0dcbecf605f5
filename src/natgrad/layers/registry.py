"""Which layers a model has: every trainable parameter lands in exactly one of them.

Modules that a registered layer describes become that layer; everything else (unknown modules, weights shared between
modules, parametrised or computed weights, half-frozen modules) becomes loose parameters with the reason beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from natgrad.layers.layer import Layer, computes_otherwise, layer_of
from natgrad.layers.uncurved import UncurvedParameter


class FoundLayer(NamedTuple):
    """A layer, its name in the model, why it is loose ("" if it is not), and the dimension of samples in its inputs."""

    name: str
    layer: Layer
    why: str
    dim: int = 0


def find_layers(
    model: nn.Module, chosen: Iterable[nn.Parameter] | None = None, batch_dim: int | Mapping[str, int] | None = None
) -> list[FoundLayer]:
    """Every layer of `model` with a parameter to train, in the model's order.

    `chosen` limits which parameters train (those of `params=`); by default all that require a gradient. `batch_dim` is
    where samples are in inputs of several dimensions, for all layers or by the names of modules and what is inside
    them; None: 1 inside of modules with `batch_first=False`, else 0.
    """
    dims: dict[str, int] = {"": batch_dim} if isinstance(batch_dim, int) else dict(batch_dim or {})
    known = {name for name, _ in model.named_modules()}
    if missing := sorted(dims.keys() - known):
        raise ValueError(f"batch_dim={dict(batch_dim)!r}: the model has no module {missing[0]!r}")  # type: ignore[arg-type]
    train = {p for p in (model.parameters() if chosen is None else chosen) if p.requires_grad}
    uses = Counter(p for module in model.modules() for p in module._parameters.values() if p is not None)
    found: list[FoundLayer] = []
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        own = {key: p for key, p in module._parameters.items() if p is not None and p in train}
        if not own:
            continue
        layer = _describe(model, name, module, own, uses)
        if isinstance(layer, Layer):
            found.append(FoundLayer(name, layer, "", dim_of(model, name, dims)))
            seen.update(own.values())
            continue
        for key, parameter in own.items():
            if parameter not in seen:
                seen.add(parameter)
                found.append(FoundLayer(f"{name}.{key}".lstrip("."), UncurvedParameter(module, parameter), layer))
    return found


def dim_of(model: nn.Module, name: str, dims: Mapping[str, int]) -> int:
    """The dimension of samples in the inputs of a module, by what is said of it or of what it is inside of."""
    path = name.split(".") if name else []
    for length in range(len(path), -1, -1):
        around = ".".join(path[:length])
        if around in dims:
            return dims[around]
        first = batch_first_of(model.get_submodule(around))
        if first is not None:
            return 0 if first else 1
    return 0


def batch_first_of(module: nn.Module) -> bool | None:
    """Whether samples come first in a module's inputs, None where it does not say."""
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        module = module.layers[0]
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        module = module.self_attn
    first = getattr(module, "batch_first", None)
    return first if isinstance(first, bool) else None


def _describe(model: nn.Module, name: str, module: nn.Module, own: dict, uses: Counter) -> Layer | str:
    for key, parameter in own.items():
        if is_lazy(parameter):
            raise ValueError(f"{name}.{key} has no shape yet: run the model once before building the optimizer")
    if any(uses[p] > 1 for p in own.values()):
        return "its weight is shared with another module"
    parent = model.get_submodule(name.rpartition(".")[0]) if name else model
    if isinstance(parent, nn.MultiheadAttention) and parent is not module:
        return "attention uses its weight without calling it"
    layer = layer_of(module)
    if isinstance(layer, str):
        return layer
    if why := computes_otherwise(module):
        return why
    trained = set(own.values())
    if any(p not in trained for p in layer.parameters):
        return "some of its parameters are frozen or computed"
    if len(trained) > len(set(layer.parameters)):
        return f"{type(module).__name__} has more parameters than its kind of layer"
    return layer
