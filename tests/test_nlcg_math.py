"""NLCG's formulas: the diagonal metric, and the betas on quadratics."""

import math
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import natgrad
from helpers import backward, clone, mlp, points, train, weights
from natgrad.optim.betas import BETAS

every_beta = pytest.mark.parametrize("beta", BETAS.values(), ids=BETAS)


def secant(n, sign=1.0):
    """(h, y, s) with y.s of this sign."""
    h, s = torch.rand(n) + 0.5, torch.randn(n)
    y = torch.randn(n)
    y += s * ((sign - y.dot(s)) / s.dot(s))
    return h, y, s


def test_the_metric_is_the_diagonal_of_dense_bfgs(double):
    for eps in (0.0, 1e-8):
        metric = natgrad.DiagonalBFGS(floor=0.0 if eps else 1e-300, eps=eps)
        h, y, s = secant(12)
        B = torch.diag(h)
        Bs = B @ s
        dense = B - torch.outer(Bs, Bs) / s.dot(Bs) + torch.outer(y, y) / y.dot(s)
        sums = metric.products(h, y, s)
        assert [float(v) for v in sums] == pytest.approx([float(y.dot(s)), float(s.dot(Bs))])
        metric.learn(h, y, (y, s), sums)
        assert bool((h > 0).all())
        assert_close(h, dense.diagonal(), rtol=1e-6 if eps else 1e-12, atol=1e-7 if eps else 1e-14)


@pytest.mark.parametrize("sums", [[9e-9, 1.0], [-1.0, 1.0], [1.0, 9e-9], [math.nan, 1.0], [1.0, math.inf]])
def test_the_metric_learns_nothing_from_a_bad_secant(sums, double):
    h, y, s = secant(5)
    before = h.clone()
    natgrad.DiagonalBFGS().learn(h, y, (y, s), list(torch.tensor(sums)))
    assert torch.equal(h, before)


def test_the_metric_has_a_floor(double):
    h, y, s = torch.ones(2), torch.tensor([1.0, 0.0]), torch.tensor([1e-3, 1e6])
    natgrad.DiagonalBFGS().learn(h, y, (y, s), list(torch.tensor([1.0, 1e12])))
    assert h.min().item() == 1e-6


def test_the_second_moment_is_adams(double):
    model, other = mlp(), mlp()
    other.load_state_dict(model.state_dict())
    adam = torch.optim.Adam(other.parameters(), lr=0.01, betas=(0.0, 0.99), eps=1e-8)
    search = natgrad.Scheduled(feedback=None)
    opt = natgrad.NLCG(model, lr=0.01, preconditioner=natgrad.SecondMoment(), beta=lambda p: 0.0, step=search)
    batches = [points(8, k, torch.float64) for k in range(5)]
    train(opt, model, batches)
    train(adam, other, batches)
    assert_close(weights(model), weights(other))


class Fixed(natgrad.optim.Metric):
    """A diagonal that is known."""

    name: ClassVar[str] = "fixed"

    def inverse(self, kept, g, steps):
        return g / torch.linspace(0.5, 2.0, len(g))


class Line(nn.Module):
    """Eight weights, eight equations: half the mean squared error has eigenvalues from 0.1 to 10."""

    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.randn(8))
        turn = torch.linalg.qr(torch.randn(8, 8))[0]
        self.A = (8 * torch.logspace(-1, 1, 8)).sqrt().unsqueeze(1) * turn
        self.t = torch.randn(8)

    def forward(self):
        return self.A @ self.x - self.t

    def loss(self):
        return self().square().mean() / 2


def down(model, opt, steps):
    """The norm of the gradient before each step."""
    norms = []
    for _ in range(steps + 1):
        opt.zero_grad()
        model.loss().backward()
        norms.append(model.x.grad.norm().item())
        opt.step(forward=model)
    return norms


@every_beta
@pytest.mark.parametrize("metric", [None, Fixed()], ids=["plain", "metric"])
def test_quadratics_end_after_as_many_steps_as_they_have_dimensions(beta, metric, double):
    model = Line()
    line = natgrad.CurvatureStep(output="squared", mu=0.0, probe=1.0)  # exact at any distance, so far from rounding
    norms = down(model, natgrad.NLCG(model, preconditioner=metric, beta=beta, beta_max=math.inf, step=line), 8)
    assert norms[8] < 1e-7 * norms[0]
    assert norms[6] > 1e-5 * norms[0]  # not by accident


def test_unclamped_fletcher_reeves_forgets_nothing(double):
    """D_k / delta_k is the sum of z_j / delta_j."""
    model = mlp()
    free = {"beta_max": math.inf, "step": natgrad.Scheduled(feedback=None)}
    opt = natgrad.NLCG(model, lr=0.02, preconditioner=None, **free)
    total = torch.zeros(len(weights(model)))
    for k in range(6):
        backward(model, points(8, k, torch.float64))
        z = torch.cat([p.grad.flatten() for p in model.parameters()])
        opt.step()
        opt.zero_grad()
        total += z / z.dot(z)
        kept = [cell.layer.unpack(opt.state[cell.layer.parameters[0]]["nlcg_direction"]) for cell in opt.cells]
        direction = torch.cat([t.flatten() for parts in kept for t in parts])
        assert_close(direction / z.dot(z), total, rtol=1e-10, atol=1e-10)


RELEASED = [name for name, beta in BETAS.items() if beta.name in ("fletcher_reeves", "polak_ribiere")]


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "hardened") for name in BETAS), *((name, "faithful") for name in RELEASED)]
)
def test_the_first_step_is_sgd(name, mode, double):
    beta = BETAS[name]
    model = mlp()
    other = clone(model)
    train(torch.optim.SGD(other.parameters(), lr=0.3), other, [points(8, 0, torch.float64)])
    batch = points(8, 0, torch.float64)
    opt = natgrad.NLCG(model, lr=0.3, beta=beta, mode=mode)
    opt.step(lambda: backward(model, batch))
    assert_close(weights(model), weights(other), rtol=1e-14, atol=1e-15)


def test_a_direction_that_does_not_descend_starts_afresh(double):
    model = mlp()
    search = natgrad.Scheduled(feedback=None)
    opt = natgrad.NLCG(model, lr=1e-3, preconditioner=None, beta=lambda p: 1e6, beta_max=math.inf, step=search)
    for sign in (1, -1):  # the same gradient turned round: d'.g = |g|^2
        opt.zero_grad()
        (sign * backward_loss(model)).backward()
        opt.step()
    assert opt.last_beta == 0.0


def backward_loss(model):
    return sum(p.sum() for p in model.parameters())
