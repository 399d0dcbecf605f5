"""Bounded samples: drawn alike for the same seed, spread over everything, right on average."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import natgrad
from helpers import backward, measured, points, statistic
from natgrad.curvature import unitwise
from natgrad.curvature.kronecker import InputMoment, OutputMoment
from natgrad.curvature.unitwise import SampleMoment
from natgrad.layers import layer_of
from natgrad.sampling import Sampler, stratified

CPU = torch.device("cpu")


def draw(seed=0, step=1, rank=0, share=1.0, layer=0, call=0):
    return Sampler(seed, step, rank, share).draw(layer, call, CPU)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 10**9))
def test_one_draw_in_each_stratum(total, wanted, seed):
    wanted = min(wanted, total)
    places = stratified(total, wanted, torch.Generator().manual_seed(seed))
    width = total / wanted
    low = (torch.arange(wanted, dtype=torch.float64) * width).long()
    assert bool((places >= low).all())
    assert bool((places <= (low + width + 1).long().clamp(max=total - 1)).all())
    assert bool((places.diff() >= 0).all())


def test_every_place_is_as_likely():
    counts = torch.zeros(10)
    for seed in range(2000):
        counts += stratified(10, 4, torch.Generator().manual_seed(seed)).bincount(minlength=10)
    assert bool(((counts / 2000 - 0.4).abs() < 0.04).all())


@pytest.mark.parametrize("what", ["seed", "step", "rank", "layer", "call"])
def test_draws_depend_on_everything_and_on_nothing_else(what):
    assert torch.equal(draw()(1000, 100), draw()(1000, 100))
    assert not torch.equal(draw()(1000, 100), draw(**{what: 7})(1000, 100))


def test_ranks_share_the_rows():
    assert len(draw(share=0.25)(1000, 100)) == 25
    assert draw(share=0.25)(1000, 5000) is None
    assert draw()(100, 100) is None


def measure(moment, layer, x, dy, seed):
    part = measured(moment, layer, x, dy, draw(seed))
    return part / len(x) if moment.order == 0 else part


def error(moment, layer, x, dy, exact, seeds):
    errors = [torch.linalg.vector_norm(measure(moment, layer, x, dy, k) - exact) for k in range(seeds)]
    return float(torch.stack(errors).mean() / torch.linalg.vector_norm(exact))


def image_layer():
    torch.manual_seed(0)
    layer = layer_of(nn.Conv2d(4, 5, 3, stride=2).double())
    x = torch.randn(40, 4, 9, 9, dtype=torch.float64) * torch.rand(40, 1, 1, 1, dtype=torch.float64) * 2
    dy = torch.randn(40, 5, 4, 4, dtype=torch.float64) / 40
    return layer, x, dy


def test_the_error_of_a_shrinks_as_samples_grow():
    layer, x, dy = image_layer()
    exact = measure(InputMoment(None), layer, x, dy, 0)
    errors = [error(InputMoment(samples), layer, x, dy, exact, 8) for samples in (1, 4, 16)]
    assert errors[0] > 1.5 * errors[1]
    assert errors[1] > 1.5 * errors[2] > 0
    assert errors[2] < 0.35


def unbiased(moment, layer, x, dy, exact, seeds=300):
    mean = torch.stack([measure(moment, layer, x, dy, k) for k in range(seeds)]).mean(0)
    far = torch.linalg.vector_norm(mean - exact) / torch.linalg.vector_norm(exact)
    one = torch.linalg.vector_norm(measure(moment, layer, x, dy, 0) - exact) / torch.linalg.vector_norm(exact)
    assert one > 0.02, "nothing was left out"
    assert far < 2 * one / seeds**0.5


def test_a_is_right_on_average():
    layer, x, dy = image_layer()
    unbiased(InputMoment(2), layer, x, dy, measure(InputMoment(None), layer, x, dy, 0))


@pytest.mark.parametrize("diagonal", [False, True])
def test_g_is_right_on_average(diagonal, monkeypatch):
    monkeypatch.setattr("natgrad.curvature.kronecker.EXACT_ROWS", 100)
    monkeypatch.setattr("natgrad.curvature.kronecker.LEAST_ROWS", 50)
    layer, x, dy = image_layer()
    exact = measure(OutputMoment(None, diagonal=diagonal), layer, x, dy, 0)
    unbiased(OutputMoment(2, diagonal=diagonal), layer, x, dy, exact)


def test_few_rows_of_g_are_exact():
    layer, x, dy = image_layer()
    assert torch.equal(measure(OutputMoment(1), layer, x, dy, 0), measure(OutputMoment(None), layer, x, dy, 0))


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.Conv2d])
def test_f_is_right_on_average(kind, monkeypatch):
    monkeypatch.setattr(unitwise, "LEAST_SAMPLES", 12)
    torch.manual_seed(0)
    layer = layer_of((nn.BatchNorm2d(4) if kind is nn.BatchNorm2d else nn.Conv2d(4, 4, 1)).double())
    x, dy = torch.randn(40, 4, 3, 3, dtype=torch.float64), torch.randn(40, 4, 3, 3, dtype=torch.float64) / 40
    exact = measure(SampleMoment(None), layer, x, dy, 0)
    unbiased(SampleMoment(2), layer, x, dy, exact)


def test_refreshes_draw_anew():
    model = nn.Sequential(nn.Linear(4, 3))
    opt = natgrad.SPNGD(model, lr=1e-12, rows_per_dim=1, refresh=1)
    seen = []
    for _ in range(3):
        backward(model, points(64, 0))
        opt.step()
        opt.zero_grad()
        seen.append(statistic(opt, "0", "A").clone())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    exact = torch.cat([points(64, 0)[0], torch.ones(64, 1)], 1)
    assert float((seen[0][0] - exact.T @ exact / 64).norm()) > 0


def test_sampled_labels_give_the_true_fisher_on_average(double):
    """fisher="sampled": G = E over x and y ~ p(.|x) of g g^T, exact here by a sum over classes."""
    model = nn.Sequential(nn.Linear(4, 3))
    x, y = points(30, 0, torch.float64)
    p = model(x).detach().softmax(1)
    exact = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)).mean(0)
    values = []
    for seed in range(200):
        opt = natgrad.SPNGD(model, lr=1e-12, rows_per_dim=None, fisher="sampled", seed=seed)
        out = model(x)
        opt.sample(out)
        F.cross_entropy(out, y).backward()
        opt.step()
        opt.zero_grad()
        values.append(statistic(opt, "0", "G")[0].clone())
        assert model[0].weight.grad is None
    mean = torch.stack(values).mean(0)
    assert float((mean - exact).norm() / exact.norm()) < 0.03
    assert float((values[0] - exact).norm() / exact.norm()) > 0.03


def test_sampled_labels_leave_gradients_alone_and_must_be_drawn():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    opt = natgrad.SPNGD(model, lr=0.1, fisher="sampled")
    x, y = points(8, 0)
    out = model(x)
    opt.sample(out)
    assert all(p.grad is None for p in model.parameters())
    expected = torch.autograd.grad(F.cross_entropy(out, y), list(model.parameters()), retain_graph=True)
    F.cross_entropy(out, y).backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected))
    opt.step()
    other = nn.Sequential(nn.Linear(4, 3))
    opt = natgrad.SPNGD(other, lr=0.1, fisher="sampled")
    backward(other, (x, y))
    with pytest.raises(ValueError, match=r"call sample\(output\) before backward"):
        opt.step()
    with pytest.raises(ValueError, match='fisher="sampled"'):
        natgrad.SPNGD(nn.Linear(4, 3), lr=0.1).sample(out)


@pytest.mark.parametrize("parts", [2, 4])
def test_sampled_labels_in_micro_batches_have_the_scale_of_a_batch(parts, double):
    model = nn.Sequential(nn.Linear(4, 3))
    x, y = points(400, 0, torch.float64)
    opt = natgrad.SPNGD(model, lr=1e-12, rows_per_dim=None, fisher="sampled")
    for a, b in zip(x.chunk(parts), y.chunk(parts)):
        out = model(a)
        opt.sample(out)
        (F.cross_entropy(out, b) / parts).backward()
    opt.step()
    p = model(x).detach().softmax(1)
    exact = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)).mean(0)
    assert float((statistic(opt, "0", "G")[0] - exact).norm() / exact.norm()) < 0.2
