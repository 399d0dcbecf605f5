"""Which layers a model has: every trainable parameter lands in exactly one of them.

A module that a registered layer describes becomes that layer. The parameters of other modules become what their shapes
say (a matrix, a vector, a matrix for each expert), which is a guess: a weight that turns out to be used otherwise loses
its curvature. A weight that several modules share is one layer. What is left (parametrised or computed weights,
half-frozen modules) becomes loose parameters with the reason beside it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import nn
from torch.nn.modules.rnn import RNNCellBase
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from natgrad.layers.embedding import Embedding
from natgrad.layers.experts import Experts
from natgrad.layers.layer import UNREGISTERED, Layer, computes_otherwise, layer_of
from natgrad.layers.linear import Linear
from natgrad.layers.norm import EntrywiseWeight
from natgrad.layers.uncurved import UncurvedParameter

RECURRENT = (nn.RNNBase, RNNCellBase)
"""Modules whose weights map inputs and states to gates, each a linear layer (recurrent.py)."""

OPAQUE = (nn.Bilinear, nn.EmbeddingBag, ParametrizationList)
"""Modules whose functions are not linear in one weight, or do not tell what they do with it."""


VECTORS = (nn.ParameterDict, nn.ParameterList)
"""Modules in which adapters keep their scales, under names of the user's."""


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
    homes = home_of(model)
    turned = transposed_types(model)
    found: list[FoundLayer] = []
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        here = {key: p for key, p in module._parameters.items() if p is not None}
        own = {key: p for key, p in here.items() if p in train and p not in seen and homes[p] is module}
        for key, parameter in own.items():
            if is_lazy(parameter):
                raise ValueError(f"{name}.{key} has no shape yet: run the model once before building the optimizer")
        if not own:
            continue
        dim = dim_of(model, name, dims)
        why = ""
        for key, layer in _layers(module, own, homes, type(module) in turned):
            if isinstance(layer, str):
                why = layer
                continue
            found.append(FoundLayer(".".join(filter(None, (name, key))), layer, "", dim))
            seen.update(layer.parameters)
        for key, parameter in own.items():
            if parameter not in seen:
                seen.add(parameter)
                found.append(FoundLayer(f"{name}.{key}".lstrip("."), UncurvedParameter(module, parameter), why))
    return found


def home_of(model: nn.Module) -> dict[nn.Parameter, nn.Module]:
    """The module with which each parameter becomes a layer: of several that share it, the first that looks rows up."""
    modules: dict[nn.Parameter, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                modules[parameter].append(module)
    tables = nn.Embedding
    return {p: next((m for m in own if isinstance(m, tables)), own[0]) for p, own in modules.items()}


def transposed_types(model: nn.Module) -> set[type]:
    """Types of modules with a weight [in, out], as the sizes of their biases show wherever the two differ."""
    found = set()
    for module in model.modules():
        weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
        if weight is None or bias is None or is_lazy(weight) or (weight.dim(), bias.dim()) != (2, 1):
            continue
        if len(bias) == weight.shape[1] != weight.shape[0]:
            found.add(type(module))
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


def _layers(
    module: nn.Module, own: Mapping[str, nn.Parameter], homes: Mapping[nn.Parameter, nn.Module], turned: bool
) -> Iterator[tuple[str, Layer | str]]:
    """The layers of a module by the names that they add to its own; reasons hold for what comes after them."""
    layer, trained = layer_of(module), set(own.values())
    if isinstance(layer, str) and isinstance(module, RECURRENT):
        yield "", "a bias without its weight, or with a weight that is frozen"
        yield from _gates(module, own)
        return
    if isinstance(layer, str):
        yield "", layer
        if layer.startswith(UNREGISTERED) and not isinstance(module, OPAQUE):
            yield from _guesses(module, own, turned)
        return
    if not layer.by_weight:
        yield "", computes_otherwise(module) or _not_whole(layer, trained, module) or layer
        return
    tied = any(homes.get(p) not in (None, module) for p in layer.parameters)
    if all(p in trained for p in layer.parameters):
        yield "", layer
    elif not tied:
        yield "", "some of its parameters are frozen or computed"
        return
    rest = {key: p for key, p in own.items() if all(p is not known for known in layer.parameters) or tied}
    yield "", f"{type(module).__name__} has more parameters than its kind of layer"
    yield from _guesses(module, rest, turned)


def _not_whole(layer: Layer, trained: set[nn.Parameter], module: nn.Module) -> str:
    """Why a layer that is watched by the calls of its module cannot be; "" if it can."""
    if any(p not in trained for p in layer.parameters):
        return "some of its parameters are frozen or computed"
    if len(trained) > len(set(layer.parameters)):
        return f"{type(module).__name__} has more parameters than its kind of layer"
    return ""


def _gates(module: nn.Module, own: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Layer]]:
    """The linear layers of a recurrent module: weight_ih_l0 with bias_ih_l0, and so on."""
    for key, weight in own.items():
        if key.startswith("weight_"):
            name = key.removeprefix("weight_")
            yield name, Linear(module, weight, own.get(f"bias_{name}"))


def _guesses(module: nn.Module, own: Mapping[str, nn.Parameter], turned: bool) -> Iterator[tuple[str, Layer]]:
    """Layers by the shapes of parameters."""
    left = {key: p for key, p in own.items() if not p.is_complex()}
    for key, weight in own.items():
        if key not in left or not key.endswith("weight"):
            continue
        name = f"{key.removesuffix('weight')}bias"
        bias = left.get(name)
        if bias is None or bias.dim() != 1:
            continue
        layer: Layer | None = None
        if weight.dim() == 1 and weight.shape == bias.shape:
            layer = EntrywiseWeight(module, (weight, bias))
        elif weight.dim() == 2:
            across = len(bias) == weight.shape[1] and (turned or len(bias) != weight.shape[0])
            layer = Linear(module, weight, bias, across) if across or len(bias) == len(weight) else None
        if layer is not None:
            layer.guess = True
            del left[key], left[name]
            yield key.removesuffix("weight").rstrip("_"), layer
    for key, parameter in left.items():
        sides = sum(n != 1 for n in parameter.shape)
        if parameter.dim() == 2 and sides == 2:
            layer = Embedding(module, parameter) if key.endswith("table") else Linear(module, parameter)
        elif parameter.dim() == 3 and sides == 3:
            layer = Experts(module, parameter)
        elif sides == 2 or (sides == 1 and (key.endswith(("weight", "bias")) or isinstance(module, VECTORS))):
            layer = EntrywiseWeight(module, (parameter,))
        else:  # a few numbers that may be anything
            continue
        layer.guess = True
        yield key, layer
