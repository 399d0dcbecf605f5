"""Inverses that survive what a training run may throw at them."""

import pytest
import torch
from torch.testing import assert_close

from natgrad.curvature import Kronecker, UnitWise
from natgrad.linalg import damped_inverse, mean_eigenvalue


def damping(*values):
    return torch.tensor(values, dtype=torch.float64)


def positive(blocks, size):
    root = torch.randn(blocks, size, size + 2, dtype=torch.float64)
    return root @ root.mT


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_good_matrix_is_inverted_without_retries(size):
    matrix = positive(4, size)
    inverse, retries = damped_inverse(matrix, damping(0.1, 1, 10, 0.01))
    eye = torch.eye(size, dtype=torch.float64)
    assert retries == 0
    assert_close(inverse @ (matrix + damping(0.1, 1, 10, 0.01)[:, None, None] * eye), eye.expand(4, -1, -1))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_zero_matrix_gives_one_over_the_damping(size):
    inverse, retries = damped_inverse(torch.zeros(2, size, size, dtype=torch.float64), damping(0.5, 2.0))
    assert retries == 0
    assert_close(inverse[0], 2 * torch.eye(size, dtype=torch.float64))
    assert_close(inverse[1], 0.5 * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 6])
def test_an_indefinite_block_takes_more_damping_and_is_counted(size):
    matrix = positive(3, size)
    matrix[1] -= 5 * torch.eye(size, dtype=torch.float64) * torch.linalg.eigvalsh(matrix[1]).max()
    good, _ = damped_inverse(matrix[[0, 2]], damping(0.1, 0.1))
    inverse, retries = damped_inverse(matrix, damping(0.1, 0.1, 0.1))
    assert retries >= 1
    assert bool(torch.isfinite(inverse).all())
    assert torch.linalg.eigvalsh(inverse).min() > 0  # downhill still
    assert_close(inverse[[0, 2]], good)  # the others are left alone


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_block_that_is_not_finite_becomes_the_plain_gradient(size, value):
    matrix = positive(2, size)
    matrix[1, 0, 0] = value
    inverse, retries = damped_inverse(matrix, damping(0.1, 0.5))
    assert bool(torch.isfinite(inverse).all())
    assert retries > 0
    assert_close(inverse[1], 2 * torch.eye(size, dtype=torch.float64))
    assert_close(inverse[0], torch.linalg.inv(matrix[0] + 0.1 * torch.eye(size, dtype=torch.float64)))


@pytest.mark.parametrize("size", [1, 2])
def test_a_small_indefinite_block_stays_downhill(size):
    matrix = -positive(2, size)
    inverse, _ = damped_inverse(matrix, damping(0.1, 0.1))
    assert bool(torch.isfinite(inverse).all())
    assert torch.linalg.eigvalsh(inverse).min() > 0


@pytest.mark.parametrize("size", [2, 40])
def test_a_singular_matrix_in_single_precision(size):
    """Rank one, entries of 1e8, damping far below the rounding error."""
    row = torch.full((1, size), 1e4)
    inverse, _ = damped_inverse((row.mT @ row).unsqueeze(0), torch.tensor([1e-6]))
    assert bool(torch.isfinite(inverse).all())
    assert torch.linalg.eigvalsh(inverse.double()).min() > -1e-3 * float(inverse.abs().max())


@pytest.mark.parametrize("size", [2, 4])
def test_tiny_and_huge_scales(size):
    for scale in (1e-15, 1e30):
        matrix = (positive(1, size) * scale).float()
        inverse, _ = damped_inverse(matrix, torch.tensor([1e-3 * scale], dtype=torch.float32))
        assert bool(torch.isfinite(inverse).all())


def test_the_mean_eigenvalue_is_that_of_blocks_and_of_diagonals():
    matrix = positive(3, 4)
    assert_close(mean_eigenvalue(matrix), torch.linalg.eigvalsh(matrix).mean(1))
    assert_close(mean_eigenvalue(matrix.diagonal(dim1=1, dim2=2)), torch.linalg.eigvalsh(matrix).mean(1))


def test_a_layer_without_signal_has_finite_inverses():
    zero = {"A": torch.zeros(1, 3, 3), "G": torch.zeros(1, 2, 2)}
    parts = Kronecker().split({k: mean_eigenvalue(v) for k, v in zero.items()}, 1e-4)
    for key, value in zero.items():
        inverse, _ = Kronecker().factor(key, value, parts[key])
        assert_close(inverse[0], 100 * torch.eye(value.shape[-1]))
    value = torch.zeros(2, 2, 2)
    parts = UnitWise().split({"F": mean_eigenvalue(value)}, 1e-4)
    assert bool(torch.isfinite(UnitWise().factor("F", value, parts["F"])[0]).all())
