"""A of a stride-1 convolution, exactly, without patches: the input's correlation with itself at each offset.

Two taps u = (i, j) and v = (l, m) of a kernel read pixels that lie (l-i, m-j) apart, so almost every block of A is
the same sum R(a, b) = sum_q x[q] x[q + (a, b)]^T, less the products whose first pixel the tap does not reach at the
border. R for all offsets is the weight gradient of a (k, 2l-1) convolution of x with itself: one library call.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 2**22  # numbers of the input at a time: its padded copy stays small


def offset_moment(
    x: Tensor,
    kernel: tuple[int, int],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    biased: bool,
    mean: bool = True,
) -> Tensor:
    """Mean or sum over samples and places of a a^T for zero-padded stride-1 convolution of x [n, c, h, w].

    Columns are ordered (tap, channel); with `biased` a constant 1 is appended. Returns [i, i].
    Derived in docs/math.md; its two levels of border corrections are kept apart below.
    """
    (k, kw), (p, q), (d, e) = kernel, padding, dilation
    n, c, h, w = x.shape
    out_h, out_w = h + 2 * p - d * (k - 1), w + 2 * q - e * (kw - 1)
    count = n * out_h * out_w
    share = 1 / count if mean else 1.0
    lines = _column_level(x, kernel, q, dilation, out_w, share)
    size = k * kw * c
    moment = x.new_empty(size + biased, size + biased)
    blocks = moment[:size, :size].unflatten(0, (k, kw * c)).unflatten(2, (k, kw * c))  # [i, (j, c), l, (m, c)]
    for i in range(k):
        blocks[i] = lines[k - 1 - i : 2 * k - 1 - i].transpose(0, 1)
        for row in _outside(i * d - p, out_h, h):
            for a in range(-i, k - i):
                if 0 <= row + a * d < h:
                    blocks[i, :, i + a].sub_(_strip(x[:, :, row], x[:, :, row + a * d], kw, q, e, out_w, share))
    if biased:
        patch = _mean_patch(x, _starts(k, d, p), _starts(kw, e, q), (out_h, out_w)).mul_(share * count)
        moment[-1, :-1] = moment[:-1, -1] = patch
        moment[-1, -1] = share * count
    return moment


def _column_level(
    x: Tensor, kernel: tuple[int, int], q: int, dilation: tuple[int, ...], out_w: int, share: float
) -> Tensor:
    """`share` times B(a) [(j, c), (m, c)] for row offsets a = -(k-1)..k-1 between the taps, as [2k-1, kw*c, kw*c].

    Correlations, less those whose first pixel is in a column that tap j does not read. B(-a) is B(a) transposed.
    """
    (k, kw), (d, e) = kernel, dilation
    below = (k - 1) * d  # zeros between samples, so that shifted lines of all samples are one product

    @cache
    def column(number: int) -> Tensor:  # of all images, as rows [n*(h+below), c]
        return _line(x[:, :, :, number], below)

    upper = _spread(_correlations(x, k, kw, d, e))
    if share != 1:
        upper.mul_(share)
    for j, m, one, other in _unread(x.shape[3], kw, q, e, out_w):
        first, second = column(one), column(other)
        for a in range(k):
            upper[a, j, :, m].addmm_(first[: len(first) - a * d].T, second[a * d :], alpha=-share)
    upper = upper.flatten(3).flatten(1, 2)
    return torch.cat([upper[1:].flip(0).transpose(1, 2), upper])


def _strip(first: Tensor, second: Tensor, kw: int, q: int, e: int, out_w: int, share: float) -> Tensor:
    """`share` times S [(j, c), (m, c)]: products of two lines [n, c, w] over the columns that tap j reads.

    The same in one dimension: correlations, less those whose first pixel tap j does not read.
    """
    c, w = first.shape[1:]
    same = first.data_ptr() == second.data_ptr()
    left = _line(first, (kw - 1) * e)
    right = left if same else _line(second, (kw - 1) * e)
    r = first.new_empty(c, 1, 2 * kw - 1, c)
    for b in range(kw):
        stop = len(left) - b * e
        r[:, 0, kw - 1 + b] = forward = left[:stop].T @ right[b * e :]
        if b:
            r[:, 0, kw - 1 - b] = forward.T if same else left[b * e :].T @ right[:stop]
    blocks = _spread(r if share == 1 else r.mul_(share))[0]
    for j, m, one, other in _unread(w, kw, q, e, out_w):
        blocks[j, :, m].addmm_(first[:, :, one].T, second[:, :, other], alpha=-share)
    return blocks.flatten(2).flatten(0, 1)


def _line(line: Tensor, gap: int) -> Tensor:
    """A line [n, c, w] of all images as rows [n*(w+gap), c], zeros between the images."""
    return pad(line.transpose(1, 2), (0, 0, 0, gap)).flatten(0, 1)


def _spread(r: Tensor) -> Tensor:
    """Correlations [c, a, 2l-1, c] at every pair of taps j, m of a row, m - j apart: [a, j, c, m, c]."""
    kw, c = (r.shape[2] + 1) // 2, r.shape[0]
    blocks = r.new_empty(r.shape[1], kw, c, kw, c)
    for j in range(kw):
        blocks[:, j] = r[:, :, kw - 1 - j : 2 * kw - 1 - j].transpose(0, 1)  # runs of kw*c numbers
    return blocks


def _unread(w: int, kw: int, q: int, e: int, out_w: int) -> list[tuple[int, int, int, int]]:
    """(j, m, column, other): pixels of a line that tap j does not read, and what lies where tap m would read then."""
    return [
        (j, m, number, number + (m - j) * e)
        for j in range(kw)
        for number in _outside(j * e - q, out_w, w)
        for m in range(kw)
        if 0 <= number + (m - j) * e < w
    ]


def _correlations(x: Tensor, k: int, kw: int, d: int, e: int) -> Tensor:
    """R(a d, b e) for a in 0..k-1, b in -(kw-1)..kw-1, as [c, k, 2l-1, c]: first pixel, offset, second pixel.

    That is the order in which channels_last leaves a weight gradient. Symmetry would do with half of the offsets of
    a = 0, but one call of 15 is faster than two of 10 and 3 (3x3).
    """
    c = x.shape[1]
    weight = x.new_empty(c, c, k, 2 * kw - 1)
    total = None
    for part in x.split(max(1, CHUNK // max(1, math.prod(x.shape[1:])))):
        below = pad(part, (0, 0, 0, (k - 1) * d))
        found = torch.ops.aten.convolution_backward(
            part, below, weight, None, (1, 1), (0, (kw - 1) * e), (d, e), False, (0, 0), 1, (False, True, False)
        )[1]  # [o, i, a, b] = sum x[o](q) x[i](q + offset)
        total = found if total is None else total.add_(found)
    assert total is not None
    return total.permute(0, 2, 3, 1).contiguous()


def _outside(first: int, outputs: int, length: int) -> list[int]:
    """Pixels of a line that a tap starting at `first` never reads."""
    return [r for r in range(length) if not first <= r < first + outputs]


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
