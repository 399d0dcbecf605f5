"""Many tensors as one buffer, symmetric matrices as their triangles.

A symmetric matrix [n, n] has n (n + 1) / 2 numbers. They fill a rectangle without any index: split the matrix at
k = ceil(n / 2); the lower triangle of the first block and the upper triangle of the second do not overlap when the
one is shifted past the other, and the square between them goes below (rectangular full packed format, Gustavson,
Wasniewski, Dongarra and Langou 2010).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

TOGETHER = 1024  # sides up to which matrices are copied behind one another, so that fewer operations pack them


def packed_numel(shape: Sequence[int], symmetric: bool) -> int:
    """How many numbers a tensor of this shape is on the wire."""
    numel = 1
    for length in shape:
        numel *= length
    if symmetric and len(shape) >= 3 and shape[-1] == shape[-2]:  # [b, d, d]; [b, d] is a diagonal
        return numel // shape[-1] * (shape[-1] + 1) // 2
    return numel


def pack_triangle(matrix: Tensor) -> Tensor:
    """Symmetric [..., n, n] as [..., n (n + 1) / 2]."""
    n = matrix.shape[-1]
    k = (n + 1) // 2
    first, second = matrix[..., :k, :k].tril(), matrix[..., k:, k:].triu()
    odd = n % 2
    head = matrix.new_zeros(*matrix.shape[:-2], k + 1 - odd, k)
    head[..., 1 - odd :, :] = first
    head[..., : n - k, odd:] += second
    return torch.cat([head.flatten(-2), matrix[..., k:, :k].flatten(-2)], -1)


def unpack_triangle(packed: Tensor, n: int) -> Tensor:
    """The inverse of `pack_triangle`."""
    k = (n + 1) // 2
    odd = n % 2
    size = (k + 1 - odd) * k
    head = packed[..., :size].unflatten(-1, (k + 1 - odd, k))
    square = packed[..., size:].unflatten(-1, (n - k, k)) if n > k else packed.new_zeros(*packed.shape[:-1], 0, k)
    first = head[..., 1 - odd :, :].tril()
    second = head[..., : n - k, odd:].triu()
    matrix = packed.new_empty(*packed.shape[:-1], n, n)
    matrix[..., :k, :k] = first + first.tril(-1).transpose(-1, -2)
    matrix[..., k:, k:] = second + second.triu(1).transpose(-1, -2)
    matrix[..., k:, :k] = square
    matrix[..., :k, k:] = square.transpose(-1, -2)
    return matrix


def flattened(tensors: Sequence[Tensor], symmetric: Sequence[bool]) -> list[Tensor]:
    """Each tensor as flat numbers, a symmetric one as its triangle. Small ones of one size are packed in one go."""
    found: list[Tensor] = list(tensors)
    alike: dict[Any, list[int]] = {}
    for k, (tensor, triangle) in enumerate(zip(tensors, symmetric)):
        if packed_numel(tensor.shape, triangle) != tensor.numel():
            n = tensor.shape[-1]
            alike.setdefault((n, tensor.dtype, tensor.device, k if n > TOGETHER else None), []).append(k)
    for ks in alike.values():
        some = [tensors[k].reshape(-1, *tensors[k].shape[-2:]) for k in ks]
        packed = pack_triangle(torch.cat(some) if len(some) > 1 else some[0])
        for k, part in zip(ks, packed.split([len(one) for one in some])):
            found[k] = part
    return [part.reshape(-1) for part in found]


def pack(tensors: Sequence[Tensor], symmetric: Sequence[bool]) -> Tensor:
    """Tensors of one dtype one behind the other."""
    return torch.cat(flattened(tensors, symmetric))


def unpack(buffer: Tensor, shapes: Sequence[Sequence[int]], symmetric: Sequence[bool]) -> list[Tensor]:
    """The tensors of a buffer made by `pack`, as views where no triangle is unfolded."""
    tensors, start = [], 0
    for shape, s in zip(shapes, symmetric):
        numel, full = packed_numel(shape, s), packed_numel(shape, False)
        part = buffer[start : start + numel]
        start += numel
        if numel == full:
            tensors.append(part.reshape(shape))
        else:
            tensors.append(unpack_triangle(part.reshape(*shape[:-2], -1), shape[-1]))
    return tensors
