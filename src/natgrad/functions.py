"""What functions of torch do with weights: from the arguments of a call to a `Use` of each weight among them.

Only functions that are linear in a weight, or hand on its numbers, are known. Whatever else is done with a weight says
that its gradient is not that of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from natgrad.layers.use import Part, Use


class KnownWeight(NamedTuple):
    """A weight that a function was given: the layer's place in the list of watched ones, and the part."""

    layer: int
    part: Part


Find = Callable[[Any], "KnownWeight | None"]


class Found(NamedTuple):
    """A use of a weight of a layer, by its place in the list."""

    layer: int
    use: Use


Reader = Callable[[Find, Sequence[Any], Mapping[str, Any], Any], Iterator[Found]]
"""From how weights are found, the arguments by position and by name, and the result."""


def bound(names: Sequence[str], defaults: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict:
    """A function's arguments by their names."""
    return {**dict.fromkeys(names), **defaults, **dict(zip(names, args)), **kwargs}


def transposed(part: Part) -> Part:
    """The transpose of the last two dimensions."""
    size, stride = list(part.size), list(part.stride)
    size[-2:], stride[-2:] = size[-1:-3:-1], stride[-1:-3:-1]
    return part._replace(size=tuple(size), stride=tuple(stride))


def with_bias(does: str, x: Tensor, weight: Any, bias: Any, out: Tensor, find: Find, channels: int, **options: Any):
    """A use of a weight and of what is added, which has a number for each index of the dimension `channels`."""
    known, added = find(weight), find(bias) if isinstance(bias, Tensor) else None
    own = known is not None and added is not None and (added.layer, added.part.place) == (known.layer, 1)
    own = own and added is not None and added.part.plain
    if known is not None:
        yield Found(known.layer, Use(does, x, known.part, added.part if own and added is not None else None, options))
    if added is not None and not own and len(added.part.size) == 1:
        ones = (1,) * (out.dim() - 1 - channels % out.dim())  # the bias stands before so many dimensions
        part = added.part._replace(size=added.part.size + ones, stride=added.part.stride + ones)
        yield Found(added.layer, Use("shift", out, part))


def linear(find: Find, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Iterator[Found]:
    """X w^T + b."""
    given = bound(("input", "weight", "bias"), {}, args, kwargs)
    yield from with_bias("linear", given["input"], given["weight"], given["bias"], out, find, -1)


def addmm(find: Find, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Iterator[Found]:
    """B + x w."""
    given = bound(("input", "mat1", "mat2"), {"beta": 1, "alpha": 1}, args, kwargs)
    if given["beta"] != 1 or given["alpha"] != 1:
        return
    known, added = find(given["mat2"]), find(given["input"])
    if known is None and added is None:
        yield from product(find, (given["mat1"], given["mat2"]), {}, out)
        return
    own = known is not None and added is not None and (added.layer, added.part.place) == (known.layer, 1)
    if known is not None:
        part = added.part if own and added is not None else None
        yield Found(known.layer, Use("linear", given["mat1"], transposed(known.part), part))
    if added is not None and not own:
        yield Found(added.layer, Use("shift", out, added.part))


def product(find: Find, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Iterator[Found]:
    """Matrix products, the weight on the right or on the left."""
    left, right = [*args, *kwargs.values()][:2]
    known = find(right)
    if known is not None and len(known.part.size) == 2:
        yield Found(known.layer, Use("linear", left, transposed(known.part)))
    elif known is not None and len(known.part.size) == 3 and left.dim() == 3:
        yield Found(known.layer, Use("grouped", left, transposed(known.part)))
    known = find(left)
    if known is not None and len(known.part.size) == 2 and right.dim() > 1:
        yield Found(known.layer, Use("left", right, known.part))


def reflected(reader: Reader) -> Reader:
    """A function whose first two arguments come in the other order."""
    return lambda find, args, kwargs, out: reader(find, [args[1], args[0]], kwargs, out)


def convolution(find: Find, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Iterator[Found]:
    """Any number of dimensions."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = bound(names, {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}, args, kwargs)
    x, weight, bias = (given.pop(name) for name in names[:3])
    yield from with_bias("conv", x, weight, bias, out, find, out.dim() - weight.dim() + 1, **given)


def transposed_convolution(find: Find, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Iterator[Found]:
    """Any number of dimensions."""
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    plain = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    given = bound(names, plain, args, kwargs)
    x, weight, bias = (given.pop(name) for name in names[:3])
    yield from with_bias("conv_transpose", x, weight, bias, out, find, out.dim() - weight.dim() + 1, **given)


def embedding(find: Find, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Iterator[Found]:
    """Rows of a table."""
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    given = bound(names, {}, args, kwargs)
    known = find(given["weight"])
    if known is None or given["scale_grad_by_freq"] or given["sparse"]:
        return
    padding = given["padding_idx"]
    if padding is not None and padding < 0:
        padding += known.part.size[0]
    yield Found(known.layer, Use("embedding", given["input"], known.part, options={"padding_idx": padding}))


def index(find: Find, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Iterator[Found]:
    """Rows of a table by whole numbers, table[index]."""
    known, chosen = find(args[0]), args[1]
    if known is not None and isinstance(chosen, Tensor) and chosen.dtype in (torch.int64, torch.int32):
        yield Found(known.layer, Use("embedding", chosen, known.part))


def norm(does: str, names: Sequence[str], **defaults: Any) -> Reader:
    """The reader of a normalisation with these arguments."""

    def read(find: Find, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Iterator[Found]:
        given = bound(names, defaults, args, kwargs)
        x, weight, bias = (given.pop(name, None) for name in ("input", "weight", "bias"))
        channels = -1 if "normalized_shape" in given else 1
        yield from with_bias(does, x, weight, bias, out, find, channels, **given)

    return read


def scale(find: Find, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Iterator[Found]:
    """Entry by entry, the weight first or second."""
    first, second = [*args, *kwargs.values()][:2]
    for weight, x in ((first, second), (second, first)):
        known = find(weight) if isinstance(weight, Tensor) and isinstance(x, Tensor) else None
        if known is not None:
            yield Found(known.layer, Use("scale", x.expand(out.shape), known.part))


def shift(find: Find, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Iterator[Found]:
    """Entry by entry, the weight first or second."""
    if kwargs.get("alpha", 1) != 1:
        return
    for weight in [*args, *kwargs.values()][:2]:
        known = find(weight) if isinstance(weight, Tensor) else None
        if known is not None:
            yield Found(known.layer, Use("shift", out, known.part))


def copied(find: Find, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Iterator[Found]:
    """A parameter that every sample gets a copy of."""
    known = find(args[0])
    if known is not None and len(out) > 1 and known.part.size[0] == 1 and out.shape[1:] == known.part.size[1:]:
        yield Found(known.layer, Use("shift", out, known.part))


def grouped(find: Find, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Iterator[Found]:
    """Rows in segments, each of one matrix."""
    given = bound(("input", "mat2"), {}, args, kwargs)
    known = find(given["mat2"])
    if known is not None and given.get("offs") is not None and given.get("bias") is None:
        options = {"ends": given["offs"]}
        yield Found(known.layer, Use("grouped", given["input"], transposed(known.part), options=options))


def _there(*places: tuple[Any, str]) -> list[Any]:
    """Functions by their names, those that this version of torch has."""
    return [getattr(where, name) for where, name in places if hasattr(where, name)]


def _methods(*names: str) -> list[Any]:
    return _there(*((Tensor, name) for name in names), *((torch, name) for name in names))


PLUS = frozenset(_methods("add", "add_", "__add__", "__radd__", "__iadd__"))
"""Sums. A number that is added to a weight changes nothing of its gradient."""

ZEROED = frozenset(_there((Tensor, "zero_"), (torch, "zero_")))
MINUS = frozenset(_methods("sub", "subtract", "__sub__"))
CHOICES = frozenset(_methods("where", "masked_fill"))
TIMES = frozenset(_methods("mul", "multiply", "__mul__", "__rmul__"))
OVER = frozenset(_methods("div", "divide", "true_divide", "__truediv__"))


def constants(func: Any, args: Sequence[Any], weight: Tensor, out: Tensor) -> Tensor | float | None:
    """By what a function multiplies the entries of a weight, 1 where it adds a number; None if it does something else.

    A tensor is constant where it has no gradient; it has the weight's shape.
    """
    if len(args) != 2 or args[0] is args[1] or out.shape != weight.shape:
        return None
    first, other = args[0] is weight, args[1] if args[0] is weight else args[0]
    if isinstance(other, (int, float)):
        if func in PLUS or (func in MINUS and first):
            return 1.0
        return float(other) if func in TIMES else 1.0 / other if func in OVER and first and other else None
    if not isinstance(other, Tensor) or other.requires_grad or other.shape != weight.shape:
        return None
    return other.detach() if func in TIMES else 1 / other.detach() if func in OVER and first else None


READERS: dict[Any, Reader] = {
    **dict.fromkeys(_there((F, "linear")), linear),
    **dict.fromkeys(_methods("addmm"), addmm),
    **dict.fromkeys(_methods("matmul", "mm", "bmm", "__matmul__"), product),
    **dict.fromkeys(_methods("__rmatmul__"), reflected(product)),
    **dict.fromkeys(_there(*((torch, f"conv{n}d") for n in (1, 2, 3))), convolution),
    **dict.fromkeys(_there(*((torch, f"conv_transpose{n}d") for n in (1, 2, 3))), transposed_convolution),
    **dict.fromkeys(_there((F, "embedding")), embedding),
    **dict.fromkeys(_methods("__getitem__"), index),
    F.layer_norm: norm("layer_norm", ("input", "normalized_shape", "weight", "bias", "eps"), eps=1e-5),
    torch.layer_norm: norm("layer_norm", ("input", "normalized_shape", "weight", "bias", "eps"), eps=1e-5),
    **dict.fromkeys(
        _there((F, "rms_norm"), (torch, "rms_norm")),
        norm("rms_norm", ("input", "normalized_shape", "weight", "eps")),
    ),
    F.group_norm: norm("group_norm", ("input", "num_groups", "weight", "bias", "eps"), eps=1e-5),
    F.batch_norm: norm(
        "batch_norm",
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
        training=False,
        eps=1e-5,
    ),
    F.instance_norm: norm(
        "instance_norm",
        ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
        use_input_stats=True,
        eps=1e-5,
    ),
    **dict.fromkeys(TIMES, scale),
    **dict.fromkeys(PLUS, shift),
    **dict.fromkeys(_methods("expand", "expand_as", "repeat"), copied),
    **dict.fromkeys(_there((F, "grouped_mm"), (torch, "_grouped_mm")), grouped),
}
"""How each function that may be given a weight reads its arguments."""

SAME_NUMBERS = frozenset(
    _methods(
        *("to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone", "cuda", "cpu"),
        *("reshape", "flatten", "view", "view_as", "reshape_as", "unsqueeze", "squeeze", "t", "transpose", "permute"),
    )
)
"""Functions whose result has the numbers of what they are given, in their order if it is no view."""
