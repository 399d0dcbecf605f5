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
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor, info = torch.linalg.cholesky_ex(matrix + damping[:, None, None] * eye)
    failed = info > 0
    retries = 0
    if bool(failed.any()):
        floor = torch.finfo(matrix.dtype).eps * matrix.abs().amax((1, 2))
        while retries < ATTEMPTS and bool(failed.any()):
            retries += 1
            grown = torch.maximum(damping, floor) * GROWTH**retries
            again, info = torch.linalg.cholesky_ex(matrix + grown[:, None, None] * eye)
            factor = torch.where((failed & (info == 0))[:, None, None], again, factor)
            failed = failed & (info > 0)
    inverse = torch.cholesky_inverse(factor)
    if bool(failed.any()):
        inverse = torch.where(failed[:, None, None], eye / damping[:, None, None], inverse)
    return inverse, retries


def _small_inverse(matrix: Tensor, damping: Tensor) -> tuple[Tensor, int]:
    """1x1 and 2x2 blocks in closed form (SP-NGD eq. 17): a positive block's determinant is at least damping^2."""
    if matrix.shape[-1] == 1:
        return 1 / (matrix + damping[:, None, None]), 0
    a = matrix[:, 0, 0] + damping
    d = matrix[:, 1, 1] + damping
    b = (matrix[:, 0, 1] + matrix[:, 1, 0]) / 2
    determinant = torch.maximum(a * d - b * b, damping * damping)  # rounding must not take it to zero
    rows = torch.stack([torch.stack([d, -b], -1), torch.stack([-b, a], -1)], -2)
    return rows / determinant[:, None, None], 0


def mean_eigenvalue(matrix: Tensor) -> Tensor:
    """The trace over the dimension [b], of full blocks [b, d, d] or of diagonals [b, d]."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1) if matrix.dim() == 3 else matrix
    return diagonal.mean(-1)
