"""A of a stride-1 convolution, exactly, without patches: the input's correlation with itself at each offset.

Two taps u = (i, j) and v = (l, m) of a kernel read pixels that lie (l-i, m-j) apart, so almost every block of A is
the same sum R(a, b) = sum_q x[q] x[q + (a, b)]^T, less the products whose first pixel the tap does not reach at the
border. R for all offsets is the weight gradient of a (k, 2l-1) convolution of x with itself: one library call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 2**22  # numbers of the input at a time: its padded copy stays small


def offset_moment(
    x: Tensor, kernel: tuple[int, int], padding: tuple[int, ...], dilation: tuple[int, ...], biased: bool
) -> Tensor:
    """Mean over samples and places of a a^T for zero-padded stride-1 convolution of x [n, c, h, w].

    Columns are ordered (tap, channel); with `biased` a constant 1 is appended. Returns [i, i].
    Derived in docs/math.md; its two levels of border corrections are kept apart below.
    """
    (k, kw), (p, q), (d, e) = kernel, padding, dilation
    n, c, h, w = x.shape
    out_h, out_w = h + 2 * p - d * (k - 1), w + 2 * q - e * (kw - 1)
    r = _correlations(x, k, kw, d, e)  # [k, 2l-1, c, c]: offsets (0..k-1, -(kw-1)..kw-1)
    below = (k - 1) * d  # zeros between samples, so that shifted lines of all samples are one product

    @cache
    def column(number: int) -> Tensor:  # of all images, as rows [n*(h+below), c]
        return pad(x[:, :, :, number].transpose(1, 2), (0, 0, 0, below)).flatten(0, 1)

    size = k * kw * c
    moment = x.new_empty(size + biased, size + biased)
    blocks = moment[:size, :size].unflatten(0, (k, kw * c)).unflatten(2, (k, kw * c))  # [i, (j, c), l, (m, c)]
    for a in range(k):  # row offset between the taps
        columns = _column_level(column, w, r[a], a * d, kw, q, e, out_w)
        for i in range(k - a):
            block = columns
            for row in _outside(i * d - p, out_h, h):
                if 0 <= row + a * d < h:
                    first, second = x[:, :, row], x[:, :, row + a * d]
                    block = block - _strip(first, second if a else first, kw, q, e, out_w)
            torch.mul(block, 1 / (n * out_h * out_w), out=blocks[i, :, i + a])
            if a:
                blocks[i + a, :, i] = blocks[i, :, i + a].T
    if biased:
        moment[-1, :-1] = moment[:-1, -1] = _mean_patch(x, _starts(k, d, p), _starts(kw, e, q), (out_h, out_w))
        moment[-1, -1] = 1
    return moment


def _correlations(x: Tensor, k: int, kw: int, d: int, e: int) -> Tensor:
    """R(a d, b e) for a in 0..k-1, b in -(kw-1)..kw-1, as [k, 2l-1, c, c]."""
    c = x.shape[1]
    weight = x.new_empty(c, c, k, 2 * kw - 1)
    total = torch.zeros_like(weight)
    for part in x.split(max(1, CHUNK // max(1, math.prod(x.shape[1:])))):
        below = pad(part, (0, 0, 0, (k - 1) * d))
        total += torch.ops.aten.convolution_backward(
            part, below, weight, None, (1, 1), (0, (kw - 1) * e), (d, e), False, (0, 0), 1, (False, True, False)
        )[1]  # [o, i, a, b] = sum x[o](q) x[i](q + offset)
    return total.permute(2, 3, 0, 1).contiguous()


def _outside(first: int, outputs: int, length: int) -> list[int]:
    """Pixels of a line that a tap starting at `first` never reads."""
    return [r for r in range(length) if not first <= r < first + outputs]


def _column_level(
    column: Callable[[int], Tensor], w: int, r: Tensor, a: int, kw: int, q: int, e: int, out_w: int
) -> Tensor:
    """B(a) [(j, c), (m, c)]: correlations at row offset a, less first pixels in columns that tap j does not read."""
    tap = torch.arange(kw, device=r.device)
    result = r[tap - tap[:, None] + kw - 1]  # [j, m, c, c]
    for j in range(kw):
        for number in _outside(j * e - q, out_w, w):
            for m in range(kw):
                if 0 <= number + (m - j) * e < w:
                    first, second = column(number), column(number + (m - j) * e)
                    result[j, m] -= first[: len(first) - a].T @ second[a:]
    size = kw * r.shape[-1]
    return result.transpose(1, 2).reshape(size, size)


def _strip(first: Tensor, second: Tensor, kw: int, q: int, e: int, out_w: int) -> Tensor:
    """S [(j, c), (m, c)]: products of two lines [n, c, w] over the columns that the taps read."""
    left = _patches(first, kw, q, e, out_w)
    return left.T @ (left if second is first else _patches(second, kw, q, e, out_w))


def _patches(line: Tensor, kw: int, q: int, e: int, out_w: int) -> Tensor:
    """What the taps of one row of the kernel read of a line [n, c, w], as rows [n*places, (tap, c)]."""
    reads = pad(line.transpose(1, 2), (0, 0, q, q)).unfold(1, out_w, 1)[:, ::e][:, :kw]  # [n, tap, c, places]
    return reads.permute(0, 3, 1, 2).flatten(0, 1).flatten(1)


def _starts(k: int, d: int, p: int) -> list[int]:
    """Where each tap's first read lies, relative to the image."""
    return [i * d - p for i in range(k)]


def _mean_patch(x: Tensor, top: list[int], left: list[int], outputs: tuple[int, int]) -> Tensor:
    """The mean over samples and places of the patch [(tap, c)]."""
    total = x.sum(0) / (x.shape[0] * outputs[0] * outputs[1])  # [c, h, w]

    def box(first: int, count: int, length: int) -> slice:
        return slice(max(first, 0), max(min(first + count, length), 0))

    means = [
        total[:, box(r, outputs[0], x.shape[2]), box(s, outputs[1], x.shape[3])].sum((1, 2)) for r in top for s in left
    ]
    return torch.cat(means)
