"""A of a stride-1 convolution, exactly, without patches: the input's correlation with itself at each offset.

Two taps u = (i, j) and v = (m, kw) of a kernel read pixels that lie (m-i, kw-j) apart, so almost every block of A is
the same sum R(a, b) = sum_q x[q] x[q + (a, b)]^T, less the products whose first pixel the tap does not reach at the
border. R for all offsets is the weight gradient of a (k, 2l-1) convolution of x with itself: one library call.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


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
    blocks = x.new_zeros(k, kw, c, k, kw, c)
    for a in range(k):  # row offset between the taps
        columns = _column_level(x, r[a], a * d, kw, q, e, out_w)  # [kw, c, kw, c]
        for i in range(k - a):
            block = columns
            for row in _outside(i * d - p, out_h, h):
                if 0 <= row + a * d < h:
                    block = block - _strip(x[:, :, row], x[:, :, row + a * d], kw, q, e, out_w)
            blocks[i, :, :, i + a] = block
            if a:
                blocks[i + a, :, :, i] = block.permute(2, 3, 0, 1)
    size = k * kw * c
    moment = blocks.reshape(size, size) / (n * out_h * out_w)
    return _with_bias(moment, x, (_starts(k, d, p), _starts(kw, e, q)), (out_h, out_w)) if biased else moment


def _starts(k: int, d: int, p: int) -> list[int]:
    """Where each tap's first read lies, relative to the image."""
    return [i * d - p for i in range(k)]


def _correlations(x: Tensor, k: int, kw: int, d: int, e: int) -> Tensor:
    """R(a d, b e) for a in 0..k-1, b in -(kw-1)..kw-1, as [k, 2l-1, c, c]."""
    c = x.shape[1]
    below = pad(x, (0, 0, 0, (k - 1) * d))
    weight = x.new_empty(c, c, k, 2 * kw - 1)
    gradient = torch.ops.aten.convolution_backward(
        x, below, weight, None, (1, 1), (0, (kw - 1) * e), (d, e), False, (0, 0), 1, (False, True, False)
    )[1]
    return gradient.permute(2, 3, 0, 1)  # gradient[o, i, a, b] = sum x[o](q) x[i](q + offset)


def _outside(first: int, outputs: int, length: int) -> list[int]:
    """Pixels of a line that a tap starting at `first` never reads."""
    return [r for r in range(length) if not first <= r < first + outputs]


def _column_level(x: Tensor, r: Tensor, a: int, kw: int, q: int, e: int, out_w: int) -> Tensor:
    """B(a)[j, :, m, :]: correlations at row offset a, less first pixels in columns that tap j does not read."""
    h, w = x.shape[2:]
    tap = torch.arange(kw, device=x.device)
    result = r[tap - tap[:, None] + kw - 1].permute(0, 2, 1, 3).contiguous()  # [j, c, m, c]
    for j in range(kw):
        for column in _outside(j * e - q, out_w, w):
            for m in range(kw):
                if 0 <= column + (m - j) * e < w:
                    first, second = x[:, :, : h - a, column], x[:, :, a:, column + (m - j) * e]
                    result[j, :, m] -= _correlate(first, second)
    return result


def _correlate(first: Tensor, second: Tensor) -> Tensor:
    """Sum over samples and pixels of x y^T [c, d] of two lines [n, c, h], [n, d, h]."""
    return first.transpose(0, 1).flatten(1) @ second.transpose(0, 1).flatten(1).T


def _strip(first: Tensor, second: Tensor, kw: int, q: int, e: int, out_w: int) -> Tensor:
    """S[j, :, m, :]: products of two lines [n, c, w] over the columns that the taps read."""
    left, right = (pad(line, (q, q)).unfold(2, out_w, 1)[:, :, ::e][:, :, :kw] for line in (first, second))
    size = kw * left.shape[1]
    rows = (line.permute(2, 1, 0, 3).reshape(size, -1) for line in (left, right))  # [(tap, channel), (sample, place)]
    return (next(rows) @ next(rows).T).reshape(kw, -1, kw, left.shape[1])


def _with_bias(moment: Tensor, x: Tensor, starts: tuple[list[int], list[int]], outputs: tuple[int, int]) -> Tensor:
    """The last row and column: the mean patch, and 1."""
    total = x.sum(0)  # [c, h, w]
    n, places = x.shape[0], outputs[0] * outputs[1]

    def box(first: int, count: int, length: int) -> slice:
        return slice(max(first, 0), max(min(first + count, length), 0))

    means = [
        total[:, box(r, outputs[0], x.shape[2]), box(s, outputs[1], x.shape[3])].sum((1, 2))
        for r in starts[0]
        for s in starts[1]
    ]
    mean = torch.cat(means) / (n * places)
    grown = torch.cat([moment, mean.unsqueeze(0)])
    return torch.cat([grown, torch.cat([mean, mean.new_ones(1)]).unsqueeze(1)], 1)
