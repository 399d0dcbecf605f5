"""Normalisations: c blocks of one unit each, W[c, 1, 2] = [scale, shift] over the rows [x_hat, 1].

x_hat is the normalised input before scale and shift. Batch normalisation in training mode takes its statistics from
the batch; the gradients of single samples then mean "with the batch's statistics held fixed" (as in SP-NGD section
4.2, which sums dy * x_hat within a sample).
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from natgrad.layers.layer import (
    Layer,
    Shape,
    at_least_single,
    layer_of,
    portions,
    promote,
    take,
    weight_and_bias,
    with_ones,
)
from natgrad.layers.op_cost import Passes, moved
from natgrad.layers.use import Form, Use


@dataclass
class NormInputs:
    """Rows [n, s, c] to be multiplied with gradients, and which of their samples (None: all).

    With a mean and a scale that a sample's places share, rows are raw: x_hat = (rows - mean) * scale.
    """

    rows: Tensor | None
    chosen: slice | None = None
    mean: Tensor | None = None
    scale: Tensor | None = None

    def take(self) -> Tensor:
        """The rows, let go: autograd is about to free the same memory."""
        rows, self.rows = self.rows, None
        assert rows is not None
        return rows


def of(x: Tensor, samples: slice | None) -> Tensor:
    """A view of the chosen samples."""
    return x if samples is None else x[samples]


class UnitSums(NamedTuple):
    """Per-sample gradients of a normalisation's channels, as the sums that they are made of; not yet written out.

    products [m, c]: sums over places of dy * rows. sums [m, c]: those of dy; None where nothing needs them. With `mean`
    and `scale` ([c] or [m, c]) rows are raw, and x_hat = (rows - mean) * scale. biased: whether channels have a shift.
    weight: by which all is multiplied.
    """

    products: Tensor
    sums: Tensor | None
    mean: Tensor | None
    scale: Tensor | None
    biased: bool
    weight: float = 1.0

    @property
    def kind(self) -> tuple[Any, ...]:
        """Sums of one kind can be joined."""
        own, centred = self.products, None if self.mean is None else self.mean.dim()
        return len(own), own.dtype, own.device, centred, self.biased, self.weight

    def written(self) -> Tensor:
        """The gradients [m, c, i]."""
        products, sums = self.products, self.sums
        if self.mean is not None and self.scale is not None and sums is not None:
            products = products.addcmul(self.mean, sums, value=-1).mul_(self.scale)
        units = torch.stack([products, sums], -1) if self.biased and sums is not None else products.unsqueeze(-1)
        return units if self.weight == 1 else units * self.weight

    @staticmethod
    def joined(parts: Sequence[UnitSums]) -> UnitSums:
        """Channels behind channels, of parts of one kind."""
        first = parts[0]
        tensors = [[t for t in own if t is not None] for own in zip(*(part[:4] for part in parts))]
        products, *rest = [torch.cat(own, -1) if own else None for own in tensors]
        assert products is not None
        return UnitSums(products, *rest, biased=first.biased, weight=first.weight)


def _private(name: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """A function of autograd that has no public name yet."""
    return getattr(getattr(torch._C, "_autograd", None), name, otherwise)


class Saved(NamedTuple):
    """What a normalisation left in the graph for its own backward pass: x, the mean, 1/deviation."""

    input: Tensor
    mean: Tensor
    scale: Tensor


SAVING = (
    "NativeBatchNormBackward0",
    "CudnnBatchNormBackward0",
    "NativeGroupNormBackward0",
    "NativeLayerNormBackward0",
)


def saved_by(output: Tensor | None) -> Saved | None:
    """What can be read off the output's graph, unless saved tensors are hooked: reading would recompute or load."""
    node = None if output is None else output.grad_fn
    if node is None or node.name() not in SAVING:
        return None
    if _private("_top_saved_tensors_default_hooks", lambda _: "unknown")(False) is not None:
        return None
    found = [getattr(node, f"_saved_{name}", None) for name in ("input", "result1", "result2")]
    tensors = [t for t in found if isinstance(t, Tensor)]
    return Saved(*tensors) if len(tensors) == len(found) else None


class NormSeen(NamedTuple):
    """An input, how often it had been written to, and its mean and 1/deviation where they are known."""

    x: Tensor
    version: int
    mean: Tensor | None
    scale: Tensor | None


class Norm(Layer):
    """What all normalisations share: a row is x_hat of one place, a block is a channel."""

    kind = "norm"
    counts_live = False  # type: ignore[assignment]  # its rows are read while the statistics are as they were

    def __init__(self, module: Any, parameters: Sequence[Any] | None = None):
        parameters = weight_and_bias(module) if parameters is None else parameters
        self.biased = len(parameters) == 2
        super().__init__(module, Shape(parameters[0].numel(), 1, len(parameters)), parameters, 1.0)

    def form(self, use: Use) -> Form | None:
        if use.does in ("scale", "shift"):
            axes = Axes.of(use, self.shape.blocks)
            if axes is None or (use.part.place == 1) != (use.does == "shift" and self.biased):
                return None
            x = use.x
            if not use.part.plain:
                if use.does == "shift":
                    return None
                times = use.part.times
                with torch.no_grad():  # y = (times * w) x is w (times * x)
                    x = x * (times.view(use.part.size) if isinstance(times, Tensor) else times)
            return Form(Entrywise(self, axes, use.does == "scale"), x)
        if not use.part.plain or (use.bias is not None and not use.bias.plain):
            return None
        if use.does not in KINDS or (use.bias is not None) != self.biased or not use.part.full or use.part.place:
            return None
        return Form(KINDS[use.does](self, use), use.x)

    def chains(self, place: int) -> bool:
        return True

    @abstractmethod
    def normalized(self, x: Tensor, samples: slice | None = None, output: Tensor | None = None) -> Tensor:
        """x_hat [m, s, c] of the samples `samples` (all without it), in x's own statistics.

        `output` is what the module made of x, if it is at hand: its graph may hold the statistics.
        """

    @abstractmethod
    def places(self, x: Tensor) -> Tensor:
        """X as [n, s, c]; a view where strides allow."""

    def count(self, x: Tensor) -> tuple[int, int]:
        return x.shape[0], math.prod(x.shape[2:])

    def rows(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        rows = self.normalized(x).flatten(0, 1)
        return with_ones(take(rows, index).unsqueeze(-1), self.biased)

    def output_rows(self, dy: Tensor, index: Tensor | None = None) -> Tensor:
        return promote(take(self.places(dy).flatten(0, 1), index)).unsqueeze(-1)

    def keep(self, x: Tensor, samples: slice | None, output: Tensor | None) -> NormInputs:
        """What `unit_gradients` needs of the input."""
        return NormInputs(self.normalized(x, samples, output))

    def unit_gradients(self, inputs: NormInputs, dy: Tensor, samples: slice | None) -> Tensor:
        """Per-sample gradients [m, c, i], the sums over places of dy * [x_hat, 1]."""
        return self.unit_sums(inputs, dy, samples).written()

    def unit_sums(self, inputs: NormInputs, dy: Tensor, samples: slice | None) -> UnitSums:
        """What `unit_gradients` are made of, in portions that stay in cache."""
        mean, scale, chosen = inputs.mean, inputs.scale, inputs.chosen
        outputs, rows = of(self.places(dy), samples), of(inputs.take(), chosen)
        dtype = at_least_single(outputs.dtype, rows.dtype)
        pairs = list(zip(portions(rows), portions(outputs)))
        products = behind([torch.sum(promote(g) * a, 1, dtype=dtype) for a, g in pairs])
        summed = self.biased or mean is not None
        sums = behind([torch.sum(g, 1, dtype=dtype) for _, g in pairs]) if summed else None
        return UnitSums(products, sums, mean, scale, self.biased)

    def projected(self, x: Tensor, u: Tensor) -> Tensor:
        rows = self.normalized(x).flatten(0, 1)
        return rows * u[:, 0] + u[:, 1] if self.biased else rows * u[:, 0]

    def projected_output(self, dy: Tensor, v: Tensor) -> Tensor:
        return promote(self.places(dy).flatten(0, 1)) * v[:, 0]

    def look(self, x: Tensor, u: Tensor, output: Tensor) -> NormSeen:
        saved = saved_by(output)
        if saved is None:
            return NormSeen(x, x._version, None, None)
        return NormSeen(saved.input, saved.input._version, saved.mean, saved.scale)

    def bilinear(self, looked: NormSeen, dy: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As many terms as inputs are not written down: their norm is that of a sample of them."""
        if looked.x._version != looked.version:  # overwritten since: there is nothing to look at
            return torch.full((), math.nan, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        scale, shift = self.summed(looked, dy)
        terms = scale * u[:, 0]
        if self.biased:
            terms = terms.addcmul(shift, u[:, 1])
        some = dy[:: max(1, len(dy) // 8)].double()
        return torch.dot(terms, v[:, 0]), torch.linalg.vector_norm(some) * math.sqrt(
            2 * dy.numel() / max(1, some.numel())
        )

    def summed(self, looked: NormSeen, dy: Tensor) -> tuple[Tensor, Tensor]:
        """The sums over all rows of dy * x_hat [c] and of dy [c]."""
        units = self.unit_gradients(self.keep(looked.x, None, None), dy, None).sum(0)
        return units[:, 0], units[:, -1]

    def passes(self, x: Tensor, y: Tensor) -> Passes:
        """Reads x for its statistics and once more, writes y; backward reads x and dy twice, writes dx."""
        half = moved(x.numel(), 2.5, "norm", 0.5)  # one call for both gradients
        return Passes((moved(x.numel(), 3, "norm"),), (half,), (half,))

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([t.reshape(-1) for t in tensors], -1).unsqueeze(1)

    def unpack(self, matrix: Tensor) -> tuple[Tensor, ...]:
        return tuple(matrix[:, 0, k].reshape(p.shape) for k, p in enumerate(self.parameters))


def behind(parts: Sequence[Tensor]) -> Tensor:
    """Parts behind one another; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class Axes(NamedTuple):
    """Dimensions of an input: places, and units (a number each of a scale or shift). The first has the samples."""

    places: tuple[int, ...]
    units: tuple[int, ...]

    @staticmethod
    def of(use: Use, count: int) -> Axes | None:
        """The axes of a function's output, None where they cannot be told."""
        part, dims = use.part, use.x.dim()
        size = (1,) * (dims - len(part.size)) + tuple(part.size)
        if len(size) > dims or not part.full or math.prod(size) != count:
            return None
        units = tuple(k for k, n in enumerate(size) if n != 1)
        if any(size[k] != use.x.shape[k] for k in units) or 0 in units:
            return None
        return Axes(tuple(k for k in range(1, dims) if k not in units), units)

    def arrange(self, x: Tensor) -> Tensor:
        """X as [n, s, c]; a view where strides allow. Dimensions that were added behind the first are places."""
        more = x.dim() - 1 - len(self.places) - len(self.units)
        x = x.permute(0, *range(1, 1 + more), *(k + more for k in (*self.places, *self.units)))
        return x.reshape(len(x), math.prod(x.shape[1 : 1 + more + len(self.places)]), -1)


class Entrywise(Norm):
    """A call in which scale or shift stand alone: y = scale * x, or y = x + shift.

    A normalisation that is written out multiplies what it has normalised, so x is x_hat. Its shift follows as a call of
    its own; the gradients of single samples add up over calls.
    """

    def __init__(self, whole: Norm, axes: Axes, scales: bool):
        for name, value in vars(whole).items():
            setattr(self, name, value)
        self.axes, self.scales = axes, scales
        last = axes.units and axes.units[-1] == max((0, *axes.places, *axes.units))
        self.free = len(axes.units) if last else None

    def places(self, x: Tensor) -> Tensor:
        return self.axes.arrange(x)

    def count(self, x: Tensor) -> tuple[int, int]:
        n, s, _ = self.places(x).shape
        return n, s

    def normalized(self, x: Tensor, samples: slice | None = None, output: Tensor | None = None) -> Tensor:
        rows = promote(of(self.places(x), samples))
        return rows if self.scales or self.biased else torch.ones_like(rows)

    def rows(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        return super().rows(x, index) * self._own(promote(x))

    def unit_sums(self, inputs: NormInputs, dy: Tensor, samples: slice | None) -> UnitSums:
        found = super().unit_sums(inputs, dy, samples)
        if self.biased and found.sums is not None:
            (found.sums if self.scales else found.products).zero_()
        return found

    def _own(self, like: Tensor) -> Tensor:
        """Which of scale and shift the call has [1 or 2]."""
        return like.new_tensor([float(self.scales), float(not self.scales)] if self.biased else [1.0])


def stand_in(parameter: Tensor | None, like: Tensor) -> Tensor | None:
    """What a kernel takes for a parameter where the gradient of the input is not wanted, so that its numbers do not
    matter: itself, or if it lies in parts on many ranks, something of its shape, in the type of `like`.
    """
    if parameter is None or type(parameter) in (nn.Parameter, Tensor):
        return parameter
    return torch.ones(parameter.shape, dtype=like.dtype, device=like.device)


class BatchNorm(Norm):
    """nn.BatchNorm1d/2d/3d: statistics over samples and places (training) or the running ones (eval)."""

    def places(self, x: Tensor) -> Tensor:
        return x.unsqueeze(1) if x.dim() == 2 else x.flatten(2).transpose(1, 2)

    def statistics(self, x: Tensor, saved: Saved | None) -> tuple[Tensor, Tensor]:
        """The mean and 1/deviation [c] that the module normalises with."""
        module = self.module
        if not (module.training or module.running_mean is None):
            return module.running_mean, (module.running_var + module.eps).rsqrt()
        if saved is not None and saved.mean.numel():
            return saved.mean, saved.scale  # computing them again would read the whole input
        variance, mean = torch.var_mean(promote(self.places(x)), (0, 1), correction=0)
        return mean, (variance + module.eps).rsqrt()

    def normalized(self, x: Tensor, samples: slice | None = None, output: Tensor | None = None) -> Tensor:
        mean, scale = self.statistics(x, saved_by(output))
        return (promote(of(self.places(x), samples)) - mean) * scale

    def look(self, x: Tensor, u: Tensor, output: Tensor) -> NormSeen:
        saved = saved_by(output)
        mean, scale = self.statistics(x, saved)
        x = x if saved is None else saved.input
        return NormSeen(x, x._version, mean.clone(), scale.clone())  # running statistics go on

    def summed(self, looked: NormSeen, dy: Tensor) -> tuple[Tensor, Tensor]:
        wanted = [False, True, True]
        assert looked.mean is not None  # `look` has computed it
        found = torch.ops.aten.native_batch_norm_backward(
            dy,
            looked.x.to(dy.dtype),
            stand_in(self.module.weight, looked.mean),
            None,
            None,
            looked.mean,
            looked.scale,
            True,
            self.module.eps,
            wanted,
        )
        return found[1], found[2]

    def keep(self, x: Tensor, samples: slice | None, output: Tensor | None) -> NormInputs:
        saved = saved_by(output)
        mean, scale = self.statistics(x, saved)
        if mean is self.module.running_mean:  # it goes on; what autograd has saved stays
            mean = mean.clone()
        if saved is not None and saved.input.data_ptr() == x.data_ptr():
            return NormInputs(self.places(x), samples, mean, scale)  # held, and guarded, by autograd anyway
        rows = self.places(x)
        return NormInputs(rows if samples is None else rows[samples].clone(), None, mean, scale)


class GroupNorm(Norm):
    """nn.GroupNorm and affine nn.InstanceNorm: statistics within a sample, over the channels of a group."""

    def __init__(self, module: Any, groups: int):
        super().__init__(module)
        self.groups = groups

    def places(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2) if x.dim() > 2 else x.unsqueeze(1)

    def normalized(self, x: Tensor, samples: slice | None = None, output: Tensor | None = None) -> Tensor:
        x = promote(of(x, samples))
        grouped = x.reshape(x.shape[0], self.groups, -1)
        variance, mean = torch.var_mean(grouped, 2, keepdim=True, correction=0)
        return self.places(((grouped - mean) * (variance + self.module.eps).rsqrt()).view_as(x))

    def summed(self, looked: NormSeen, dy: Tensor) -> tuple[Tensor, Tensor]:
        x = looked.x
        if looked.mean is None or looked.scale is None or looked.mean.numel() != len(x) * self.groups:
            return super().summed(looked, dy)
        sizes = len(x), x.shape[1], math.prod(x.shape[2:]), self.groups
        dy, x = dy.contiguous(), x.to(dy.dtype).contiguous()
        found = torch.ops.aten.native_group_norm_backward(
            dy, x, looked.mean, looked.scale, stand_in(self.module.weight, dy), *sizes, [False, True, True]
        )
        return found[1], found[2]


class LayerNorm(Norm):
    """nn.LayerNorm and nn.RMSNorm: statistics over the trailing dimensions, each of which is a block of its own."""

    def __init__(self, module: Any, centered: bool):
        super().__init__(module)
        self.centered = centered
        self.free = len(module.normalized_shape)

    def count(self, x: Tensor) -> tuple[int, int]:
        n, s, _ = self.places(x).shape
        return n, s

    def places(self, x: Tensor) -> Tensor:
        samples = x.shape[0] if x.dim() > len(self.module.normalized_shape) else 1
        return x.reshape(samples, -1, math.prod(self.module.normalized_shape))

    def normalized(self, x: Tensor, samples: slice | None = None, output: Tensor | None = None) -> Tensor:
        rows = promote(of(self.places(x), samples))
        eps = self.module.eps if self.module.eps is not None else torch.finfo(x.dtype).eps
        if not self.centered:
            return rows * (rows.square().mean(-1, keepdim=True) + eps).rsqrt()
        variance, mean = torch.var_mean(rows, -1, keepdim=True, correction=0)
        return (rows - mean) * (variance + eps).rsqrt()

    def summed(self, looked: NormSeen, dy: Tensor) -> tuple[Tensor, Tensor]:
        if looked.mean is None:
            return super().summed(looked, dy)
        module, x = self.module, looked.x.to(dy.dtype)
        wanted = [False, True, module.bias is not None]
        weight, bias = stand_in(module.weight, dy), stand_in(module.bias, dy)
        found = torch.ops.aten.native_layer_norm_backward(
            dy, x, module.normalized_shape, looked.mean, looked.scale, weight, bias, wanted
        )
        return found[1].flatten(), (found[2] if wanted[2] else found[1]).flatten()


class EntrywiseWeight(Norm):
    """A parameter that scales activations or is added to them, entry by entry: a block of its own for each entry."""

    def normalized(self, x: Tensor, samples: slice | None = None, output: Tensor | None = None) -> Tensor:
        raise TypeError("what a vector is multiplied with is known by its calls alone")

    def places(self, x: Tensor) -> Tensor:
        raise TypeError("which entries a vector acts on is known by its calls alone")


def _called(norm: type[Norm], whole: Norm, **options: Any) -> Any:
    """A normalisation of another kind or with other settings than its module says, with the same scale and shift."""
    form = copy.copy(whole)
    form.__class__ = norm
    bias = whole.parameters[1] if whole.biased else None
    form.module = SimpleNamespace(weight=whole.parameters[0], bias=bias, **options)
    return form


def _batch(whole: Norm, use: Use) -> Norm:
    given = use.options
    running = {name: given.get(name) for name in ("running_mean", "running_var")}
    return _called(BatchNorm, whole, training=given["training"], eps=given["eps"], **running)


def _layer(whole: Norm, use: Use) -> Norm:
    shape = tuple(use.options["normalized_shape"])
    form = _called(LayerNorm, whole, normalized_shape=shape, eps=use.options["eps"])
    form.centered, form.free = use.does == "layer_norm", len(shape)
    return form


def _group(whole: Norm, use: Use) -> Norm:
    form = _called(GroupNorm, whole, eps=use.options["eps"])
    form.groups = use.options.get("num_groups", whole.shape.blocks)
    return form


KINDS: dict[str, Callable[[Norm, Use], Norm]] = {
    "batch_norm": _batch,
    "layer_norm": _layer,
    "rms_norm": _layer,
    "group_norm": _group,
    "instance_norm": _group,
}


@layer_of.register
def _(module: _BatchNorm) -> Norm | str:
    return BatchNorm(module) if module.weight is not None else "it has no scale and shift"


@layer_of.register
def _(module: nn.SyncBatchNorm) -> str:
    return "its batch statistics are spread over ranks"


@layer_of.register
def _(module: _InstanceNorm) -> Norm | str:
    if module.weight is None:
        return "it has no scale and shift"
    if module.track_running_stats:
        return "instance normalisation with running statistics is not known"
    return GroupNorm(module, module.num_features)


@layer_of.register
def _(module: nn.GroupNorm) -> Norm | str:
    return GroupNorm(module, module.num_groups) if module.weight is not None else "it has no scale and shift"


@layer_of.register
def _(module: nn.LayerNorm) -> Norm | str:
    return LayerNorm(module, centered=True) if module.weight is not None else "it has no scale and shift"


@layer_of.register
def _(module: nn.RMSNorm) -> Norm | str:
    return LayerNorm(module, centered=False) if module.weight is not None else "it has no scale"
