"""Convolutions of any number of dimensions, stride, padding (and mode), dilation and groups, in one table.

For an output place p and a kernel tap t, `taps` [places, taps] holds the flat index of the input pixel that the tap
reads, or -1 for a zero of the padding. Every padding mode is just another map of coordinates, so a row of patches is
one gather, and only the rows that are wanted are ever touched (docs/math.md: no im2col).

Columns are ordered (tap, channel), channel fastest: a gathered pixel is a run of memory.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import lru_cache, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from natgrad.layers.conv_moment import offset_moment
from natgrad.layers.layer import (
    Layer,
    Shape,
    he_scale,
    layer_of,
    moment,
    pack_columns,
    promote,
    split_pair,
    take,
    weight_and_bias,
    with_ones,
)
from natgrad.layers.op_cost import NUMBER, OpCost, Passes, launched, moment_of, moved
from natgrad.layers.use import Form, Use

PIXELS = 2**22  # numbers of the input that are copied at a time where they are rows as they are
CHUNK = 2**20  # floats of gathered patches at a time: larger temporaries pay page faults
LINE = 2**16  # numbers of a table of what the outputs of a line read; longer lines are shifted instead


class PatchVector(NamedTuple):
    """A vector over patches [b, taps * channels (+1)] that is a product: pixel [b, channels], a number for each tap of
    every axis, and bias [b, 1] where patches have a constant 1.
    """

    pixel: Tensor
    taps: tuple[Tensor, ...]
    bias: Tensor | None


class Conv(Layer):
    """nn.Conv1d/2d/3d: one block a group, W[groups, out/groups, taps * in/groups (+1)] (SP-NGD eq. 10-11)."""

    kind = "conv"

    def __init__(self, module: nn.Conv1d | nn.Conv2d | nn.Conv3d):
        self.biased = module.bias is not None
        self.groups = module.groups
        self.kernel = tuple(module.kernel_size)
        self.mode = module.padding_mode
        total = _total(module.padding, self.kernel, module.dilation)  # of which "same" puts the odd one behind
        self.geometry = tuple(zip(self.kernel, module.stride, (t // 2 for t in total), total, module.dilation))
        self.channels = module.in_channels // module.groups
        inner = math.prod(self.kernel) * self.channels
        shape = Shape(module.groups, module.out_channels // module.groups, inner + self.biased)
        super().__init__(module, shape, weight_and_bias(module), he_scale(inner))

    def form(self, use: Use) -> Form | None:
        given, dims = use.options, len(self.kernel)
        fits = use.does == "conv" and use.part.full and not use.part.place and (use.bias is not None) == self.biased
        if not fits or given["groups"] != self.groups or use.x.dim() not in (dims + 1, dims + 2):
            return None
        stride, dilation = _each(given["stride"], dims), _each(given["dilation"], dims)
        total = _total(given["padding"], self.kernel, dilation)
        geometry = tuple(zip(self.kernel, stride, (t // 2 for t in total), total, dilation))
        if (geometry, "zeros") == (self.geometry, self.mode):
            return Form(self, use.x)
        other = copy.copy(self)  # the function is given what its module has padded, as far as it has
        other.geometry, other.mode = geometry, "zeros"
        return Form(other, use.x)

    def _taps(self, x: Tensor) -> Tensor:
        return tap_table(self.geometry, self.mode, tuple(x.shape[2:]), x.device)

    def _batched(self, x: Tensor) -> Tensor:
        return x if x.dim() == len(self.kernel) + 2 else x.unsqueeze(0)

    def count(self, x: Tensor) -> tuple[int, int]:
        x = self._batched(x)
        return x.shape[0], self._taps(x).shape[0]

    def rows(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        x = self._batched(x)
        if index is None and self.mode == "zeros":
            patches = promote(self._windows(x))
        else:
            patches = promote(self._patches(x, index))
        if self.groups > 1:
            patches = patches.unflatten(-1, (self.groups, self.channels)).transpose(1, 2)
        return with_ones(patches.reshape(len(patches), self.groups, -1), self.biased)

    def _patches(self, x: Tensor, index: Tensor | None) -> Tensor:
        """Patches [m, taps, channels] at the places `index`, touching only the pixels that they read."""
        taps = self._taps(x)
        places = taps.shape[0]
        if index is None:
            index = torch.arange(x.shape[0] * places, device=x.device)
        sample, place = index.div(places, rounding_mode="floor"), index.remainder(places)
        pixel = taps[place]  # [m, taps]
        if self.mode != "zeros" or not any(total for *_, total, _ in self.geometry):
            return _gather(x, sample, pixel)
        patches = _gather(x, sample, pixel.clamp_min(0))
        return patches.mul_((pixel >= 0).unsqueeze(-1))

    def _windows(self, x: Tensor) -> Tensor:
        """All patches [m, taps, channels] of the zero-padded input: one copy of runs of memory."""
        widths = [w for _, _, before, total, _ in reversed(self.geometry) for w in (before, total - before)]
        x = (pad(x, widths) if any(widths) else x).movedim(1, -1).contiguous()
        for axis, (k, stride, _, _, dilation) in enumerate(self.geometry, 1):
            x = x.unfold(axis, dilation * (k - 1) + 1, stride)[..., ::dilation]
        x = x.movedim(len(self.kernel) + 1, -1)  # [n, places..., taps..., c]
        return x.flatten(1 + len(self.kernel), -2).flatten(0, len(self.kernel))

    def second_moment(self, x: Tensor) -> Tensor:
        return self.moment_total(x).div_(math.prod(self.count(x)))

    def moment_total(self, x: Tensor) -> Tensor:
        x = self._batched(x)
        if self._pointwise and self.groups == 1:
            return self._pointwise_total(promote(x))
        if self.offsets_apply(x):
            (k, _, _, _, _), (kw, _, _, _, _) = self.geometry
            padding, dilation = tuple(g[2] for g in self.geometry), tuple(g[4] for g in self.geometry)
            return offset_moment(promote(x), (k, kw), padding, dilation, self.biased, mean=False).unsqueeze(0)
        step = max(1, CHUNK // max(1, self.shape.inner * self.groups * self._taps(x).shape[0]))
        first, *parts = x.split(step)
        total = moment(self.rows(first), mean=False)
        for part in parts:
            total.add_(moment(self.rows(part), mean=False))
        return total

    @property
    def counts_live(self) -> bool:
        """Places of a sequence are counted by their gradients; those of an image all count (SP-NGD eq. 11)."""
        return len(self.kernel) == 1

    def live_total(self, x: Tensor, live: Tensor) -> Tensor:
        x = self._batched(x)
        live = live.view(len(x), -1)
        step = max(1, CHUNK // max(1, self.shape.inner * self.groups * live.shape[1]))
        total = promote(x).new_zeros(self.groups, self.shape.inner, self.shape.inner)
        for part, own in zip(x.split(step), live.split(step)):
            total.add_(super().live_total(part, own.flatten()))
        return total

    @property
    def _pointwise(self) -> bool:
        """Whether every place reads one pixel, its own."""
        return all(k == stride == 1 and not total for k, stride, _, total, _ in self.geometry)

    def _pointwise_total(self, x: Tensor) -> Tensor:
        """`moment_total` of pixels as they are."""
        total = None
        for part in x.split(max(1, PIXELS * len(x) // max(1, x.numel()))):
            rows = with_ones(part.movedim(1, -1).reshape(-1, 1, x.shape[1]), self.biased)
            own = moment(rows, mean=False)
            total = own if total is None else total.add_(own)
        assert total is not None
        return total

    def offsets_apply(self, x: Tensor) -> bool:
        """Whether A is a correlation of the input with itself (docs/math.md)."""
        return (
            len(self.kernel) == 2
            and self.groups == 1
            and self.mode == "zeros"
            and all(stride == 1 and 2 * before == total for _, stride, before, total, _ in self.geometry)
            and all(size > dilation * (k - 1) for size, (k, _, _, _, dilation) in zip(x.shape[2:], self.geometry))
            and self.channels >= 8
        )

    def second_moment_cost(self, x: Tensor) -> float:
        x = self._batched(x)
        if not self.offsets_apply(x):
            return super().second_moment_cost(x)
        k, kw = self.kernel
        return float(k * (2 * kw - 1) * self.channels**2 * x.shape[0] * math.prod(x.shape[2:]))

    def second_moment_work(self, x: Tensor) -> tuple[OpCost, ...]:
        x = self._batched(x)
        inner = self.shape.inner
        if not self.offsets_apply(x):
            n, s = self.count(x)
            return *self.rows_work(x, n * s), moment_of(n * s, inner, self.groups)
        flops = 2 * self.second_moment_cost(x)
        correlation = OpCost("conv_backward", flops, NUMBER * 3.0 * x.numel(), self.channels, 4)
        return correlation, moved(inner**2, 4, calls=self.kernel[0]), launched(12 * self.kernel[0])

    def rows_work(self, x: Tensor, count: int) -> tuple[OpCost, ...]:
        """Patches; before them the whole input padded, or by places, unless few are read."""
        x = self._batched(x)
        rows = moved(count * self.groups * self.shape.inner, 2, "gather"), launched(12)
        pixels = x.shape[0] * math.prod(x.shape[2:])
        few = count * math.prod(self.kernel) * 8 < pixels
        return rows if few else (*rows, moved(x.numel(), 4 if count >= pixels else 2, "gather"))

    def passes(self, x: Tensor, y: Tensor) -> Passes:
        """One convolution forward, and one each for the gradients of inputs and weights: the same products."""
        flops = 2.0 * y.numel() * math.prod(self.kernel) * self.channels
        touched = NUMBER * (x.numel() + y.numel() + self.parameters[0].numel())
        size = min(self.channels * math.prod(self.kernel) ** 0.5, self.shape.out)
        back = OpCost("conv_backward", flops, touched, size, 0.5)  # one call makes both gradients
        bias = (moved(y.numel(), 1),) if self.biased else ()
        return Passes((OpCost("conv", flops, touched, size),), (back,), (back, *bias))

    def mean_square(self, x: Tensor) -> Tensor:
        x = self._batched(x)
        taps = self._taps(x)
        square = promote(x).square().sum(0).flatten(1)  # [channels, pixels]
        read = square[:, taps.clamp_min(0)] * (taps >= 0)  # [channels, places, taps]
        mean = read.sum(1).T / (x.shape[0] * taps.shape[0])  # [taps, channels]
        mean = mean.unflatten(1, (self.groups, self.channels)).transpose(0, 1).flatten(1)
        return torch.cat([mean, mean.new_ones(self.groups, 1)], 1) if self.biased else mean

    def output_rows(self, dy: Tensor, index: Tensor | None = None) -> Tensor:
        flat = self._batched(dy).flatten(2)  # [n, c, s]
        places = flat.shape[2]
        if index is None or flat.stride(1) == 1:
            rows = take(flat.transpose(1, 2).flatten(0, 1), index)
        else:
            rows = flat[index.div(places, rounding_mode="floor"), :, index.remainder(places)]
        return promote(rows).unflatten(1, (self.groups, -1))

    def output_moment(self, dy: Tensor) -> Tensor:
        dy = self._batched(dy)
        if self.groups > 1 or not dy.is_contiguous():
            return super().output_moment(dy)
        flat = promote(dy.flatten(2))
        return torch.bmm(flat, flat.transpose(1, 2)).sum(0, keepdim=True)  # no transposed copy of NCHW

    def probe(self, **options: Any) -> PatchVector:
        """No tap is near zero, and no two are alike: a gradient that is wrong at some taps alone is noticed as well."""
        signs = [2 * torch.randint(2, (k,), **options) - 1 for k in self.kernel]
        taps = tuple(s * (0.5 + torch.rand(len(s), **options)) if len(s) > 1 else s.square() for s in signs)
        pixel = torch.randn(self.groups, self.channels, **options)
        return PatchVector(pixel, taps, torch.randn(self.groups, 1, **options) if self.biased else None)

    def written_out(self, u: PatchVector) -> Tensor:
        taps = reduce(lambda one, other: (one.unsqueeze(1) * other).flatten(), u.taps)
        vector = (taps.unsqueeze(1) * u.pixel.unsqueeze(1)).flatten(1)
        return vector if u.bias is None else torch.cat([vector, u.bias], 1)

    def projected(self, x: Tensor, u: PatchVector) -> Tensor:
        """As [n, b, s]: first all channels of a pixel, which reads the input once, then its taps, axis by axis."""
        x = promote(self._batched(x))
        if self.mode != "zeros":
            x = self._padded(x)
        if self.groups == 1 and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            found = (x.permute(0, 2, 3, 1).reshape(-1, self.channels) @ u.pixel[0]).view(len(x), 1, *x.shape[2:])
        else:
            found = (u.pixel.unsqueeze(1) @ x.unflatten(1, (self.groups, -1)).flatten(3)).squeeze(2)
            found = found.unflatten(2, x.shape[2:])
        for axis, (taps, own) in enumerate(zip(u.taps, self.geometry), 2):
            found = self._along(found, axis, taps, own)
        found = found.flatten(2)
        return found if u.bias is None else found + u.bias

    def _along(self, x: Tensor, axis: int, taps: Tensor, geometry: tuple) -> Tensor:
        """The sums over the taps of one axis, each times its number."""
        k, stride, before, total, dilation = geometry
        before, total = (before, total) if self.mode == "zeros" else (0, 0)
        size, shape = x.shape[axis], list(x.shape)
        if (k, stride, total) == (1, 1, 0):  # the number of a single tap is 1
            return x
        shape[axis] = outputs = (size + total - dilation * (k - 1) - 1) // stride + 1
        if size * outputs <= LINE:  # a product with what the taps of every output read is faster than shifts
            table = tap_lines(k, stride, before, dilation, size, outputs, x.device).to(taps.dtype)
            reads = (taps @ table).view(outputs, size)
            lines = x.reshape(math.prod(shape[:axis]), size, -1)
            return (reads @ lines if lines.shape[2] > 1 else lines[..., 0] @ reads.T).view(shape)
        result = x.new_zeros(shape)
        for tap, factor in enumerate(taps.unbind()):
            start = dilation * tap - before
            first = max(0, -(start // stride)) if start < 0 else 0
            count = min(outputs - 1, (size - 1 - start) // stride) + 1 - first
            if count > 0:
                read = x.narrow(axis, first * stride + start, (count - 1) * stride + 1)
                read = read[(slice(None),) * axis + (slice(None, None, stride),)]
                result.narrow(axis, first, count).addcmul_(read, factor)
        return result

    def _padded(self, x: Tensor) -> Tensor:
        """An input with the padding that the module gives it, where that is not zeros."""
        widths = [w for _, _, before, total, _ in reversed(self.geometry) for w in (before, total - before)]
        return pad(x, widths, mode=self.mode) if any(widths) else x

    def projected_output(self, dy: Tensor, v: Tensor) -> Tensor:
        dy = promote(self._batched(dy))
        if self.groups == 1 and dy.dim() == 4 and dy.is_contiguous(memory_format=torch.channels_last):
            return (dy.permute(0, 2, 3, 1) @ v[0]).flatten(1).unsqueeze(1)
        return (v.unsqueeze(1) @ dy.unflatten(1, (self.groups, -1)).flatten(3)).squeeze(2)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        weight, bias = split_pair(tensors)
        matrix = weight.unflatten(0, (self.groups, -1)).flatten(3).transpose(2, 3).flatten(2)
        return pack_columns(matrix, bias)

    def unpack(self, matrix: Tensor) -> tuple[Tensor, ...]:
        weight = matrix[..., :-1] if self.biased else matrix
        weight = weight.unflatten(2, (-1, self.channels)).transpose(2, 3)
        weight = weight.reshape(self.parameters[0].shape)
        return (weight, matrix[..., -1].flatten()) if self.biased else (weight,)


def _gather(x: Tensor, sample: Tensor, pixel: Tensor) -> Tensor:
    """Pixels [m, t] of samples [m] of x [n, c, ...], as [m, t, c]."""
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    runs = x.dim() in (4, 5) and x.is_contiguous(memory_format=last)
    pixels = math.prod(x.shape[2:])
    if not runs and pixel.numel() * 8 < x.shape[0] * pixels:
        return x.flatten(2)[sample.unsqueeze(1), :, pixel]  # few pixels: not worth a copy of the whole input
    flat = x.movedim(1, -1).reshape(-1, x.shape[1])
    return torch.nn.functional.embedding(sample.unsqueeze(1) * pixels + pixel, flat)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """A number for each dimension."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _total(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """Padding of both sides together, per dimension."""
    if padding == "same":
        return tuple(d * (k - 1) for d, k in zip(dilation, kernel))
    if padding == "valid":
        return (0,) * len(kernel)
    return tuple(2 * p for p in _each(padding, len(kernel)))


@lru_cache(maxsize=256)
def tap_table(geometry: tuple, mode: str, size: tuple[int, ...], device: torch.device) -> Tensor:
    """Flat input pixel [places, taps] that each tap reads at each output place; -1 where it reads padding."""
    table = torch.zeros(1, 1, dtype=torch.long)
    inside = torch.ones(1, 1, dtype=torch.bool)
    for (k, stride, before, total, dilation), length in zip(geometry, size):
        outputs = (length + total - dilation * (k - 1) - 1) // stride + 1
        place = torch.arange(outputs)[:, None] * stride + torch.arange(k) * dilation - before  # [outputs, k]
        valid = (place >= 0) & (place < length)
        coordinate = _wrap(place, length, mode)
        table = _outer(table * length, coordinate, torch.add)
        inside = _outer(inside, valid if mode == "zeros" else torch.ones_like(valid), torch.logical_and)
    return torch.where(inside, table, -1).to(device)


@lru_cache(maxsize=256)
def tap_lines(k: int, stride: int, before: int, dilation: int, size: int, outputs: int, device: torch.device) -> Tensor:
    """Whether each tap reads a pixel of a line at each output place, as numbers [k, outputs * size]."""
    read = torch.arange(outputs)[:, None] * stride + torch.arange(k)[:, None, None] * dilation - before
    return (read == torch.arange(size)).float().flatten(1).to(device)


def _outer(left: Tensor, right: Tensor, combine) -> Tensor:
    """Every pair of places and every pair of taps: [p, t] with [o, k] gives [p*o, t*k]."""
    pairs = combine(left[:, None, :, None], right[None, :, None, :])
    return pairs.reshape(left.shape[0] * right.shape[0], -1)


def _wrap(place: Tensor, length: int, mode: str) -> Tensor:
    if mode == "circular":
        return place.remainder(length)
    if mode == "reflect":
        folded = place.abs()
        return torch.where(folded >= length, 2 * (length - 1) - folded, folded)
    return place.clamp(0, length - 1)  # replicate; and zeros, which are masked


@layer_of.register(nn.Conv1d)
@layer_of.register(nn.Conv2d)
@layer_of.register(nn.Conv3d)
def _(module) -> Conv | str:
    return Conv(module)


class TransposedConv(Layer):
    """nn.ConvTranspose1d/2d/3d of one group, without its bias: W[1, taps * out, in].

    A row is an input pixel; its outputs are the pixels that its taps write to, which are the patches that a convolution
    reads out of the output's gradient. The bias is a vector of its own.
    """

    kind = "conv"

    def __init__(self, module: Any):
        weight = module.weight
        inner, self.out, self.taps = weight.shape[0], weight.shape[1], math.prod(weight.shape[2:])
        super().__init__(module, Shape(1, self.taps * self.out, inner), (weight,), he_scale(inner))
        self.reads = self._reader(module.stride, module.padding, module.dilation)

    def _reader(self, stride: Any, padding: Any, dilation: Any) -> Conv:
        """The convolution that reads patches of the output's gradient."""
        reader = Conv.__new__(Conv)
        reader.kernel, reader.mode, reader.biased = tuple(self.parameters[0].shape[2:]), "zeros", False
        reader.groups, reader.channels = 1, self.out
        dims = len(reader.kernel)
        before = _each(padding, dims)
        sides = before, (2 * p for p in before)
        reader.geometry = tuple(zip(reader.kernel, _each(stride, dims), *sides, _each(dilation, dims)))
        return reader

    def form(self, use: Use) -> Form | None:
        given, dims = use.options, len(self.reads.kernel)
        if use.does != "conv_transpose" or not use.part.full or use.part.place or use.x.dim() != dims + 2:
            return None
        if any(more >= s for more, s in zip(_each(given["output_padding"], dims), _each(given["stride"], dims))):
            return None  # the output has places that no input writes to and a convolution would read
        other = copy.copy(self)
        other.reads = self._reader(given["stride"], given["padding"], given["dilation"])
        return Form(other, use.x)

    @property
    def counts_live(self) -> bool:
        return len(self.reads.kernel) == 1

    def count(self, x: Tensor) -> tuple[int, int]:
        return x.shape[0], math.prod(x.shape[2:])

    def rows(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        return promote(take(x.flatten(2).transpose(1, 2).flatten(0, 1), index)).unsqueeze(1)

    def output_rows(self, dy: Tensor, index: Tensor | None = None) -> Tensor:
        return self.reads.rows(dy, index)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].flatten(2).permute(2, 1, 0).flatten(0, 1).unsqueeze(0)

    def unpack(self, matrix: Tensor) -> tuple[Tensor, ...]:
        weight = matrix[0].unflatten(0, (self.taps, self.out)).permute(2, 1, 0)
        return (weight.unflatten(2, self.parameters[0].shape[2:]),)


@layer_of.register(nn.ConvTranspose1d)
@layer_of.register(nn.ConvTranspose2d)
@layer_of.register(nn.ConvTranspose3d)
def _(module) -> TransposedConv | str:
    return TransposedConv(module) if module.groups == 1 else "a transposed convolution in groups is not known"
