"""Inverses that survive bad matrices: a factorisation that fails is tried again with more damping, and counted."""

from __future__ import annotations

import torch
from torch import Tensor

ATTEMPTS = 8
GROWTH = 10.0


def damped_inverse(matrix: Tensor, damping: Tensor) -> tuple[Tensor, int]:
    """(matrix + damping I)^-1 of symmetric positive matrices [b, d, d] with damping [b], and the retries it took.

    A block whose Cholesky factorisation fails gets GROWTH times more damping, at least the rounding error of its
    largest entry, until it succeeds. A block that never does (not finite) gets the identity over its damping: a
    step along the plain gradient, not a lost run.
    """
    if matrix.shape[-1] <= 2:
        return _small_inverse(matrix, damping)
    factor, good = _cholesky(matrix, damping)
    if bool(good.all()):  # the one time that the host waits for the device
        return torch.cholesky_inverse(factor), 0
    retries = 0
    floor = torch.finfo(matrix.dtype).eps * matrix.abs().amax((1, 2))
    while retries < ATTEMPTS and not bool(good.all()):
        retries += 1
        again, better = _cholesky(matrix, torch.maximum(damping, floor) * GROWTH**retries)
        factor = torch.where((better & ~good)[:, None, None], again, factor)
        good = good | better
    last = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device) / damping[:, None, None]
    return torch.where(good[:, None, None], torch.cholesky_inverse(factor), last), retries


def _cholesky(matrix: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """The lower factor of matrix + damping I, and which blocks [b] have one."""
    damped = matrix.clone()
    damped.diagonal(dim1=1, dim2=2).add_(damping[:, None])
    factor, info = torch.linalg.cholesky_ex(damped)
    return factor, (info == 0) & torch.isfinite(factor.diagonal(dim1=1, dim2=2).sum(1))  # inf has a root: inf


def _small_inverse(matrix: Tensor, damping: Tensor) -> tuple[Tensor, int]:
    """1x1 and 2x2 blocks in closed form (SP-NGD eq. 17).

    A positive block's determinant is at least damping^2; where rounding says less, the entry b beside the diagonal
    is shortened until it is. Blocks with a negative diagonal or without finite values get the identity over damping.
    """
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    bad = ~((diagonal >= 0).all(1) & torch.isfinite(matrix.sum((1, 2))))
    if matrix.shape[-1] == 1:
        inverse = 1 / (matrix + damping[:, None, None])
    else:
        scale = diagonal.amax(1) + damping  # entries in its units: squares neither overflow nor vanish
        a, d = ((diagonal + damping[:, None]) / scale[:, None]).unbind(1)
        floor = (damping / scale).square()
        limit = (a * d - floor).clamp_min(0).sqrt()
        b = torch.clamp((matrix[:, 0, 1] + matrix[:, 1, 0]) / (2 * scale), -limit, limit)
        determinant = torch.maximum(a * d - b * b, floor) * scale
        inverse = (torch.stack([d, -b, -b, a], -1) / determinant[:, None]).unflatten(1, (2, 2))
    last = torch.diag_embed((1 / damping)[:, None].expand_as(diagonal))
    return torch.where(bad[:, None, None], last, inverse), int(bad.sum())


def mean_eigenvalue(matrix: Tensor) -> Tensor:
    """The trace over the dimension [b], of full blocks [b, d, d] or of diagonals [b, d]."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1) if matrix.dim() == 3 else matrix
    return diagonal.mean(-1)
