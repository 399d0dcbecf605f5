"""The paper's theory: in a wide two-layer network with a fixed second layer the loss falls linearly (in its logarithm).

Yang et al. 2022: f(x) = a . phi(W x) / sqrt(width) with a of random signs that stay, squared loss, the whole data at
every step, no sketch. While W moves little the gradients of f stay what they are, and residuals r follow

    dr/dt = -J^T (lambda I + F)^-1 J r / n.
"""

import math

import pytest
import torch
from torch import nn

import natgrad

SAMPLES, INPUTS = 12, 40


class TwoLayers(nn.Module):
    """x [n, inputs] -> [n, 1]; only the first layer learns."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Linear(INPUTS, width, bias=False)
        nn.init.normal_(self.first.weight)
        self.register_buffer("signs", torch.randint(2, (width,)) * 2.0 - 1)

    def forward(self, x):
        return torch.relu(self.first(x)) @ self.signs.unsqueeze(1) / len(self.signs) ** 0.5


def losses(width, steps, seed=0, **options):
    """The loss before every step, from unit inputs and targets of order 1.

    Inputs stand at right angles, so that the kernel's eigenvalues are alike: else the loss is a sum of exponentials,
    and its logarithm becomes straight only when the slowest is left.
    """
    torch.manual_seed(seed)
    x = torch.linalg.qr(torch.randn(INPUTS, SAMPLES, dtype=torch.float64)).Q.T
    y = torch.randn(SAMPLES, 1, dtype=torch.float64)
    model = TwoLayers(width).double()
    optimizer = natgrad.SENG(model, momentum=0.0, refresh=1, samples=None, sketch=None, length=natgrad.plain, **options)
    told = []
    for _ in range(steps):
        loss = (model(x) - y).square().mean() / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        told.append(loss.item())
    return told, (model, x)


def straightness(values):
    """(slope, R^2) of a line through the values."""
    steps = torch.arange(len(values), dtype=torch.float64)
    y = torch.tensor(values, dtype=torch.float64)
    slope = ((steps - steps.mean()) * (y - y.mean())).sum() / (steps - steps.mean()).square().sum()
    rest = y - y.mean() - slope * (steps - steps.mean())
    return slope.item(), 1 - (rest.square().sum() / (y - y.mean()).square().sum()).item()


def straight(told, part=None):
    """Assert that the logarithms above rounding lie on a line; return its slope."""
    logs = [math.log(value) for value in told if value > 1e-24]
    slope, fit = straightness(logs[part] if part else logs)
    assert slope < 0
    assert fit > 0.99, (slope, fit)
    return slope


@pytest.mark.parametrize(("lr", "damping"), [(0.1, 1e-3), (0.3, 1e-4)])
def test_improved_columns_shrink_every_residual_alike(lr, damping):
    """Columns over the residuals are those of J: with little damping each step leaves 1 - lr of every residual."""
    told, _ = losses(2000, 60, lr=lr, damping=damping, columns="improved")
    assert straight(told) == pytest.approx(2 * math.log(1 - lr), rel=0.05)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_loss_falls_linearly(seed):
    """The whole way, from order 1 over five orders of magnitude, and both halves of it."""
    told, _ = losses(2000, 300, seed, lr=0.5, damping=0.5)  # a tenth of it slows down the first steps
    assert told[-1] < 1e-5 * told[0]
    straight(told)
    straight(told, slice(0, 150))
    straight(told, slice(150, None))


def test_the_rate_is_that_of_the_kernel_once_residuals_are_small():
    """The columns vanish with the residuals, and what is left is the kernel's: r <- (I - lr / lambda J^T J / n) r."""
    lr, damping = 0.05, 0.05
    told, (model, x) = losses(2000, 500, lr=lr, damping=damping)
    rows = [torch.autograd.grad(out, model.first.weight, retain_graph=True)[0].flatten() for out in model(x)[:, 0]]
    jacobian = torch.stack(rows)
    slowest = torch.linalg.eigvalsh(jacobian @ jacobian.T / SAMPLES)[0].item()
    assert straight(told, slice(400, None)) == pytest.approx(2 * math.log(1 - lr / damping * slowest), rel=0.02)


def test_weights_hardly_move_in_a_wide_network():
    moved = []
    for width in (200, 3200):
        torch.manual_seed(0)
        _, (model, _) = losses(width, 1, lr=0.05, damping=0.05)
        start = model.first.weight.detach().clone()
        _, (model, _) = losses(width, 100, lr=0.05, damping=0.05)
        moved.append((torch.linalg.vector_norm(model.first.weight - start) / torch.linalg.vector_norm(start)).item())
    assert moved[1] < 0.5 * moved[0]
    assert moved[1] < 0.02
