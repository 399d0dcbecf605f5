"""What a layer looks like to curvature: b independent blocks of weights, W[b, out, in], the bias as the last column.

Whatever a module computes, here it is a linear map of rows: y[n, s, b, :] = W[b] a[n, s, b, :].

    n  samples              b  independent blocks (1; groups of a convolution; channels of a norm)
    s  places that share W  i  inputs of a block, the constant 1 of the bias included (homogeneous coordinate)
    row = (sample, place)   o  outputs of a block

A layer says how to read rows out of what its module saw (`rows`, `output_rows`), what their second moments are
when there is a cheaper way than rows (`second_moment`, `output_moment`), and how gradients and weights are packed
to W's form and back. It reads no `.grad` and knows no curvature.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache, reduce, singledispatch
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from natgrad.layers.op_cost import OpCost, Passes, launched, moment_of, moved, product
from natgrad.layers.use import Form, Use

BANDED = 256  # from this dimension on symmetry saves products on CPUs (docs/math.md)
BANDS = 6
UNREGISTERED = "no layer is registered for"
NOTHING = {dtype: 32 * torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32)}
"""Up to so much of the largest row's gradient a row's gradient is the rounding of one."""
CACHED = 2**16  # numbers that stay in a core's cache while they are worked on


class Shape(NamedTuple):
    """The form of a layer's weights, W[blocks, out, inner]."""

    blocks: int
    out: int
    inner: int

    @property
    def numel(self) -> int:
        return self.blocks * self.out * self.inner


class Layer(ABC):
    """One module as W[b, out, in]. Final classes say how; users may add their own with `layer_of.register`."""

    kind: str
    shape: Shape
    parameters: tuple[nn.Parameter, ...]  # the weight first, then the bias if there is one
    diagonal_inputs = False  # rows never overlap (an embedding's one-hot rows): A is exactly diagonal
    free: int | None = None  # trailing dimensions of an input that are features; None: samples always come first
    guess = False  # it is only a guess that the parameters are used as this layer says
    per_sample = True  # which rows are whose is known
    uneven = False  # blocks have unlike numbers of rows: `live_rows`
    scale: float  # the root mean square of a healthy weight, for lengths that divide by a weight's norm

    def __init__(self, module: Any, shape: Shape, parameters: Sequence[Any], scale: float):
        self.module = module
        self.shape = shape
        self.parameters = tuple(parameters)
        self.scale = scale

    def form(self, use: Use) -> Form | None:
        """The layer as one call of a function uses its weight; None where that cannot be told."""
        return None

    def chains(self, place: int) -> bool:
        """Whether a parameter that was multiplied by constants before its use is known too (Part.times)."""
        return False

    def exchanged(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Of a `late` form: inputs and the gradients of outputs, for a call on x whose output has the gradient dy."""
        raise TypeError(f"{type(self).__name__} reads its input as it comes")

    @property
    def by_weight(self) -> bool:
        """Whether the functions of torch that are given the weight tell what the layer computes.

        A class from outside is watched by the calls of its module instead, unless it has a `form` of its own: its
        module may run a kernel that is no function of torch.
        """
        known = next(kind for kind in type(self).__mro__ if "form" in vars(kind))
        return known is not Layer and known.__module__ == type(self).__module__

    @property
    def numel(self) -> int:
        """The numbers of the whole layer, also where this is a part of it (layers/shards.py)."""
        return self.shape.numel

    @abstractmethod
    def count(self, x: Tensor) -> tuple[int, int]:
        """The number of samples n and of places s in one call on x."""

    @abstractmethod
    def rows(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """Input rows a [m, b, i] at the places `index` [m] of the flattened (sample, place) list; all without it."""

    @abstractmethod
    def output_rows(self, dy: Tensor, index: Tensor | None = None) -> Tensor:
        """Rows of the output's gradient [m, b, o], as `rows`."""

    @abstractmethod
    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors shaped like `parameters` as one W[b, o, i]."""

    @abstractmethod
    def unpack(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """W[b, o, i] as tensors shaped like `parameters`, views of it; the inverse of `pack`."""

    def tokens(self, x: Tensor) -> Tensor | None:
        """Where rows are one-hot: the place of the one in every row [m], -1 for none. None where they are not."""
        return None

    def second_moment(self, x: Tensor) -> Tensor:
        """The mean over all rows of a a^T [b, i, i]."""
        return moment(self.rows(x), mean=True)

    def moment_total(self, x: Tensor) -> Tensor:
        """The sum over all rows of a a^T [b, i, i]."""
        if type(self).second_moment is Layer.second_moment:
            return moment(self.rows(x), mean=False)
        return self.second_moment(x) * math.prod(self.count(x))

    def second_moment_cost(self, x: Tensor) -> float:
        """Multiplications that `second_moment` takes, to be weighed against a sample of rows."""
        n, s = self.count(x)
        return self.shape.blocks * gram_cost(n * s, self.shape.inner)

    def rows_work(self, x: Tensor, count: int) -> tuple[OpCost, ...]:
        """What reading so many rows of an input like x takes (x may be on the meta device)."""
        return moved(count * self.shape.blocks * self.shape.inner, 2, "gather"), launched(6)

    def second_moment_work(self, x: Tensor) -> tuple[OpCost, ...]:
        """What `second_moment` of an input like x takes."""
        n, s = self.count(x)
        return *self.rows_work(x, n * s), moment_of(n * s, self.shape.inner, self.shape.blocks)

    def passes(self, x: Tensor, y: Tensor) -> Passes:
        """What a call on x that gave y takes, forward and backward (both may be on the meta device)."""
        n, s = self.count(x)
        blocks, out = self.shape.blocks, self.shape.out
        inner = self.parameters[0].numel() // max(1, blocks * out)
        return Passes(
            (product(n * s, inner, out, blocks),),
            (product(n * s, out, inner, blocks),),
            (product(out, n * s, inner, blocks, 2),),
        )

    def mean_square(self, x: Tensor) -> Tensor:
        """The diagonal of `second_moment` [b, i]."""
        return self.rows(x).square().mean(0)

    @property
    def counts_live(self) -> bool:
        """Whether A is a mean over the rows of a call whose output has a gradient; else over all its rows.

        A layer with a way to A that reads no rows counts all of them.
        """
        return type(self).second_moment is Layer.second_moment

    def row_sizes(self, dy: Tensor) -> Tensor:
        """The largest absolute number of each row of the output's gradient [rows], by which rows count (`counted`)."""
        return row_sizes(self.output_rows(dy).flatten(1))

    def live_total(self, x: Tensor, live: Tensor) -> Tensor:
        """The sum over the rows `live` [rows] of a a^T [b, i, i]."""
        rows = self.rows(x)
        return moment(rows * live.to(rows.dtype).view(-1, 1, 1), mean=False)

    def live_squares(self, x: Tensor, live: Tensor) -> Tensor:
        """The diagonal of `live_total` [b, i]."""
        return (self.rows(x).square() * live.view(-1, 1, 1)).sum(0)

    def live_rows(self, live: Tensor) -> Tensor:
        """How many rows there are [1], or of each block where they are `uneven` [b], in double precision."""
        return live.sum(dtype=torch.float64).view(1)

    def output_moment(self, dy: Tensor) -> Tensor:
        """The SUM over all rows of g g^T [b, o, o]."""
        return moment(self.output_rows(dy), mean=False)

    def probe(self, **options: Any) -> Any:
        """A random vector u for `projected`, in the form in which that is cheapest. options: those of torch.randn."""
        b, _, i = self.shape
        return torch.randn(b, i, **options)

    def written_out(self, u: Any) -> Tensor:
        """What `probe` has made, as u [b, i]."""
        return u

    def projected(self, x: Tensor, u: Any) -> Tensor:
        """Every input row's products a . u [rows, b] with u of `probe`, in the layout of `projected_output`."""
        return torch.einsum("mbi,bi->mb", self.rows(x), u)

    def projected_output(self, dy: Tensor, v: Tensor) -> Tensor:
        """Every row's products g . v [rows, b] of the output's gradient with v [b, o], in any layout."""
        return torch.einsum("mbo,bo->mb", self.output_rows(dy), v)

    def look(self, x: Tensor, u: Any, output: Tensor) -> Any:
        """What `bilinear` needs of one call on x that gave `output`."""
        return self.projected(x, u)

    def bilinear(self, looked: Any, dy: Tensor, u: Any, v: Tensor) -> tuple[Tensor, Tensor]:
        """v^T dW u of one call, summed over blocks, and the norm of its terms, scalars in at least single precision.

        The gradient of W is the sum over rows of g a^T, so v^T dW u is the sum over rows of (g . v)(a . u).
        """
        terms = self.projected_output(dy, v).mul_(looked).double()  # torch converts faster than it adds up converting
        return terms.sum(), torch.linalg.vector_norm(terms)

    def sample_gradients(self, rows: Tensor, output_rows: Tensor, samples: int) -> Tensor:
        """Per-sample gradients [n, b, o, i]: sums over a sample's places of g a^T.

        `rows` [n*s, b, i] and `output_rows` [n*s, b, o] of `samples` = n whole samples.
        """
        a = rows.unflatten(0, (samples, -1))
        g = output_rows.unflatten(0, (samples, -1))
        return torch.einsum("nsbo,nsbi->nboi", g, a)


def moment(rows: Tensor, mean: bool) -> Tensor:
    """Sum or mean over rows [m, b, d] of r r^T, as [b, d, d], in at least single precision."""
    rows = promote(rows)
    if rows.shape[1] == 1:
        total = gram(rows[:, 0]).unsqueeze(0)
    else:
        blocks = rows.transpose(0, 1)
        total = blocks.transpose(1, 2) @ blocks
    return total.div_(rows.shape[0]) if mean else total


def gram(rows: Tensor) -> Tensor:
    """The sum over rows [m, d] of r r^T, in bands on and right of the diagonal where that pays."""
    size = rows.shape[1]
    if size < BANDED or rows.device.type != "cpu":
        return rows.T @ rows
    total, width = rows.new_empty(size, size), math.ceil(size / BANDS)
    edges = [(start, min(start + width, size)) for start in range(0, size, width)]
    for start, stop in edges:
        torch.mm(rows[:, start:stop].T, rows[:, start:], out=total[start:stop, start:])
    mirrored = [(total[stop:, start:stop], total[start:stop, stop:].T) for start, stop in edges if stop < size]
    torch._foreach_copy_([below for below, _ in mirrored], [right for _, right in mirrored])
    return total


def gram_cost(rows: int, size: int) -> float:
    """Multiplications of `gram`."""
    return rows * size**2 * (1.0 if size < BANDED else (BANDS + 1) / (2 * BANDS))


def promote(x: Tensor) -> Tensor:
    """X in at least single precision: half-precision sums lose positivity."""
    return x.to(at_least_single(x.dtype))


@cache
def at_least_single(dtype: torch.dtype, *others: torch.dtype) -> torch.dtype:
    """The type that holds all of these, or single precision where that is more precise."""
    return reduce(torch.promote_types, others, torch.promote_types(dtype, torch.float32))


def real(x: Tensor) -> Tensor:
    """X as real numbers [..., 2] where it is complex, sharing its memory."""
    return torch.view_as_real(x) if x.is_complex() else x


def real_type(x: Tensor) -> torch.dtype:
    """The type of what is kept of x: real numbers in at least single precision."""
    return at_least_single(real(x.detach()).dtype)


def take(x: Tensor, index: Tensor | None) -> Tensor:
    """Entries `index` along the first dimension, all of them without one."""
    return x if index is None else x.index_select(0, index)


def row_sizes(dy: Tensor) -> Tensor:
    """The largest absolute number of each row of a gradient [..., features], as [rows]."""
    return torch.linalg.vector_norm(dy.reshape(-1, dy.shape[-1]), math.inf, 1)


def counted(sizes: Tensor) -> Tensor:
    """Which rows have a gradient that is not zero to rounding, by the sizes of all rows of a call [rows].

    A place that attends to itself alone has a gradient of zero, or of some roundings of others'. In half precision
    nothing but zero is zero.
    """
    if not sizes.numel():
        return sizes.bool()
    return ~(sizes <= NOTHING.get(sizes.dtype, 0.0) * sizes.max())


def all_counted(sizes: Tensor) -> bool:
    """Whether all rows count, where that is known without waiting for a device."""
    if sizes.device.type != "cpu" or not sizes.numel():
        return False
    least, most = torch.aminmax(sizes)
    return bool(least > NOTHING.get(sizes.dtype, 0.0) * most)


def portions(x: Tensor) -> tuple[Tensor, ...]:
    """Views of x along the first dimension, each so large that it stays in cache.

    Another device than the processor gets all at once: there it is launches that cost, not passes over memory.
    """
    if x.device.type != "cpu":
        return (x,)
    step = CACHED * len(x) // max(1, x.numel())
    return x.split(max(1, step))


def with_ones(rows: Tensor, wanted: bool) -> Tensor:
    """Rows [m, b, d] with the bias's constant 1 as the last column."""
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], -1) if wanted else rows


def pack_columns(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Weight [b, o, d] and bias [b*o] as W[b, o, i]."""
    if bias is None:
        return weight
    return torch.cat([weight, bias.reshape(*weight.shape[:2], 1)], -1)


def weight_and_bias(module: Any) -> tuple[Any, ...]:
    """The weight of a module, and its bias if it has one."""
    bias = getattr(module, "bias", None)
    return (module.weight,) if bias is None else (module.weight, bias)


def split_pair(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """(weight,) or (weight, bias) as a pair."""
    return tensors[0], tensors[1] if len(tensors) > 1 else None


def he_scale(fan_in: int) -> float:
    """The standard deviation of He's initialisation (He et al. 2015, eq. 10)."""
    return math.sqrt(2 / max(fan_in, 1))


@singledispatch
def layer_of(module: nn.Module) -> Layer | str:
    """The Layer of a module, or the reason why it has none. Register a type to teach natgrad a new layer.

    A subclass of a known type is that type as long as it computes the same (`computes_otherwise`).
    """
    return f"{UNREGISTERED} {type(module).__name__}"


def computes_otherwise(module: nn.Module) -> str:
    """Why a module does not compute what the type that is registered for it computes; "" if it does.

    A module is what its forward says: the forward method must be that of the registered type, and so must every
    method of that type that the forward method calls (a convolution's `_conv_forward`).
    """
    kind = next((base for base in type(module).__mro__ if base in layer_of.registry and base is not object), None)
    if kind is None:
        return ""
    for name in called_by_forward(kind):
        if name in vars(module):
            return f"its {name} was replaced on the module; natgrad knows that of {kind.__name__}"
        if getattr(type(module), name) is not getattr(kind, name):
            own = type(module)
            said = own.__name__ if own.__name__ != kind.__name__ else f"{own.__module__}.{own.__name__}"
            return f"{said} has a {name} of its own; natgrad knows that of {kind.__name__} (see layer_of.register)"
    return ""


@cache
def called_by_forward(kind: type) -> list[str]:
    """`forward` and the names of the methods of a type that it calls, directly or through others."""
    found, names = [], ["forward"]
    while names:
        name = names.pop()
        method = getattr(kind, name, None)
        if name in found or not isinstance(method, FunctionType) or (hasattr(nn.Module, name) and name != "forward"):
            continue
        if "NotImplementedError" in method.__code__.co_names:
            continue  # subclasses are meant to fill it in
        found.append(name)
        names += method.__code__.co_names
    return found
