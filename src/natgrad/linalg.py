"""Inverses that survive bad matrices: a factorisation that fails is tried again with more damping, and counted.

`first_inverse` and `first_cholesky` try once and leave it to the caller to look at what came of it, when the host reads
from the device anyway. `damped_inverse` and `damped_cholesky` look at once and try again.
"""

from __future__ import annotations

import torch
from torch import Tensor

ATTEMPTS = 8
GROWTH = 10.0


def first_inverse(matrix: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """(matrix + damping I)^-1 of [b, d, d] with damping [b], and which blocks [b] have one. Nobody waits."""
    if matrix.shape[-1] <= 2:
        return _closed_form(matrix, damping)
    factor, good = first_cholesky(matrix, damping)
    return inverse_of_factor(factor), good


def inverse_of_factor(factor: Tensor) -> Tensor:
    """(L L^T)^-1 of lower factors L [b, d, d]: LAPACK's inverse, which is symmetric, read row by row as it lies."""
    return torch.cholesky_inverse(factor).mT


def first_cholesky(matrix: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """The lower factors of matrix + damping I, and which blocks [b] have one; where there is none it has no meaning."""
    factor, good = _cholesky(matrix, damping)
    factor.diagonal(dim1=1, dim2=2).clamp_min_(torch.finfo(factor.dtype).tiny)  # triangular solvers stumble over 0
    return factor, good


def damped_inverse(matrix: Tensor, damping: Tensor) -> tuple[Tensor, int]:
    """(matrix + damping I)^-1 of symmetric positive matrices [b, d, d] with damping [b], and the retries it took.

    A block whose Cholesky factorisation fails gets GROWTH times more damping, at least the rounding error of its
    largest entry, until it succeeds. A block that never does (not finite) gets the identity over its damping: a
    step along the plain gradient, not a lost run.
    """
    if matrix.shape[-1] <= 2:
        inverse, good = _closed_form(matrix, damping)
        if bool(good.all()):
            return inverse, 0
    factor, good, retries = _factor(matrix, damping)
    if good is None:
        return inverse_of_factor(factor), retries
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    inverse = torch.cholesky_inverse(torch.where(good[:, None, None], factor, eye))  # LAPACK raises where a root is 0
    return torch.where(good[:, None, None], inverse, eye / damping[:, None, None]), retries


def _factor(matrix: Tensor, damping: Tensor) -> tuple[Tensor, Tensor | None, int]:
    """Lower factors [b, d, d], the blocks [b] that have one (None: all), and the retries that it took."""
    factor, good = _cholesky(matrix, damping)
    if bool(good.all()):  # the one time that the host waits for the device
        return factor, None, 0
    retries = 0
    floor = torch.finfo(matrix.dtype).eps * matrix.abs().amax((1, 2))
    while retries < ATTEMPTS and not bool(good.all()):
        retries += 1
        again, better = _cholesky(matrix, torch.maximum(damping, floor) * GROWTH**retries)
        factor = torch.where((better & ~good)[:, None, None], again, factor)
        good = good | better
    return factor, good, retries


def _cholesky(matrix: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """The lower factor of matrix + damping I, and which blocks [b] have one."""
    damped = matrix.clone()
    damped.diagonal(dim1=1, dim2=2).add_(damping[:, None])
    factor, info = torch.linalg.cholesky_ex(damped)
    roots = factor.diagonal(dim1=1, dim2=2).sum(1)
    return factor, torch.add(info, roots, alpha=0) == 0  # infinity has a root, and 0 times it is not 0


def _closed_form(matrix: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """The inverses of 1x1 and 2x2 blocks (SP-NGD eq. 17), and which [b] can be trusted.

    A positive block's determinant is at least damping^2; if it is less, rounding has eaten it. Its squares must
    neither overflow nor vanish.
    """
    limits = torch.finfo(matrix.dtype)
    a, *rest = (matrix.diagonal(dim1=1, dim2=2) + damping[:, None]).unbind(1)
    if not rest:
        return (1 / a)[:, None, None], (a >= damping) & (a <= limits.max)
    d, b = rest[0], matrix[:, 0, 1]
    determinant = a * d - b * b
    least = damping.square().clamp_min(limits.tiny / limits.eps)
    inverse = torch.stack([d, -b, -b, a], -1) / determinant[:, None]
    return inverse.unflatten(1, (2, 2)), (a > 0) & (determinant >= least) & (determinant <= limits.max)


def mean_eigenvalue(matrix: Tensor) -> Tensor:
    """The trace over the dimension [b], of full blocks [b, d, d] or of diagonals [b, d]."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1) if matrix.dim() == 3 else matrix
    return diagonal.mean(-1)


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor, int]:
    """Eigenvectors [b, d, d] as columns and eigenvalues [b, d] of symmetric positive matrices, and the retries.

    Negative eigenvalues are rounding and become 0. A block on which the algorithm does not converge is tried again
    with a share of its trace added to its diagonal (and taken off again), and is finally taken as a multiple of I.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors, values.clamp_min(0), 0
    except torch.linalg.LinAlgError:
        if len(matrix) > 1:
            parts = [eigen(block.unsqueeze(0)) for block in matrix]
            return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), sum(p[2] for p in parts)
    eye, mean = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device), mean_eigenvalue(matrix)
    for retry in range(1, ATTEMPTS + 1):
        shift = mean * torch.finfo(matrix.dtype).eps * GROWTH**retry
        try:
            values, vectors = torch.linalg.eigh(matrix + shift[:, None, None] * eye)
            return vectors, (values - shift[:, None]).clamp_min(0), retry
        except torch.linalg.LinAlgError:
            continue
    return eye.expand_as(matrix).clone(), mean[:, None].expand(matrix.shape[:2]).clone(), ATTEMPTS


def damped_cholesky(matrix: Tensor, damping: Tensor) -> tuple[Tensor, int]:
    """The lower Cholesky factors of matrix + damping I for symmetric positive [b, d, d], damping [b], and the retries.

    A block that never succeeds gets the factor of its trace plus the damping times I: it shortens, and turns nothing.
    """
    factor, good, retries = _factor(matrix, damping)
    if good is None:
        return factor, retries
    size = torch.nan_to_num(mean_eigenvalue(matrix) * matrix.shape[-1], posinf=0.0, neginf=0.0).clamp_min(0) + damping
    last = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device) * size.sqrt()[:, None, None]
    return torch.where(good[:, None, None], factor, last), retries
