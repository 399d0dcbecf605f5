"""The noise scale of the gradient, from shares of it, against what single samples say."""

import math

import pytest
import torch
from torch.nn import functional as F

import natgrad
from helpers import mlp, points, train
from multi import run_threads
from natgrad.optim.gradient_noise import Squares, scale_of


def exact(model, x, y):
    """(|G|^2, tr(S)) of these samples as the whole distribution."""
    rows = []
    for k in range(len(x)):
        model.zero_grad()
        F.cross_entropy(model(x[k : k + 1]), y[k : k + 1]).backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    model.zero_grad()
    rows = torch.stack(rows).double()
    mean = rows.mean(0)
    return float(mean.square().sum()), float((rows - mean).square().sum() / len(rows))


def test_two_squares_tell_signal_and_noise():
    """Expectations of both squares give both numbers back."""
    signal, noise, n, share = 3.0, 40.0, 50, 0.3
    part = share**2 * signal + share * noise / n
    told = Squares(part, signal + noise / n, share).apart()
    assert told == pytest.approx((signal, noise / n))
    assert scale_of({"signal": 2.0, "noise": 30.0}) == 15.0
    assert scale_of({"signal": -0.1, "noise": 30.0}) == math.inf
    assert scale_of({"signal": 0.0, "noise": 0.0}) is None


@pytest.fixture(scope="module")
def world_of_samples():
    torch.manual_seed(0)
    model = mlp()
    x, y = points(400, 0)
    y = torch.where(torch.arange(400) % 3 > 0, (x[:, 0] > 0).long(), y)  # something to learn
    return model, x, y, exact(model, x, y)


def draws(steps, n, of):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(of, (n,), generator=generator) for _ in range(steps)]


OPTIONS = {"lr": 1e-30, "refresh": 1, "length": natgrad.plain}


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_micro_batches_tell_the_noise_scale(world_of_samples, parts, max_norm):
    model, x, y, (signal, noise) = world_of_samples
    opt = natgrad.SPNGD(model, max_norm=max_norm, **OPTIONS)
    found = []
    for index in draws(400, 16, 400):
        for part in index.chunk(parts):
            (F.cross_entropy(model(x[part]), y[part]) / parts).backward()
        half = opt.engine.capture._half
        assert half is not None
        opt.step()
        opt.zero_grad()
        found.append((opt.param_groups[0]["signal"], opt.param_groups[0]["noise"]))
    told = torch.tensor(found[50:], dtype=torch.float64).mean(0)
    assert float(told[1]) == pytest.approx(noise, rel=0.1)
    assert float(told[0]) == pytest.approx(signal, rel=0.15)
    assert opt.noise_scale is not None
    opt.engine.capture.disarm()


def test_ranks_tell_the_same_noise_scale(world_of_samples):
    start, x, y, (signal, noise) = world_of_samples
    state = {k: v.clone() for k, v in start.state_dict().items()}

    def work(world):
        model = mlp()
        model.load_state_dict(state)
        opt = natgrad.SPNGD(model, world=world, **OPTIONS)
        found = []
        for index in draws(300, 16, 400):
            part = index.chunk(world.size)[world.rank]
            F.cross_entropy(model(x[part]), y[part]).backward()
            opt.step()
            opt.zero_grad()
            found.append((opt.param_groups[0]["signal"], opt.param_groups[0]["noise"]))
        return found

    results = run_threads(4, work)
    assert all(found == results[0] for found in results)
    told = torch.tensor(results[0][50:], dtype=torch.float64).mean(0)
    assert float(told[1]) == pytest.approx(noise, rel=0.1)
    assert float(told[0]) == pytest.approx(signal, rel=0.15)


def test_one_pass_on_one_rank_tells_nothing():
    model = mlp()
    opt = natgrad.SPNGD(model, lr=0.1)
    train(opt, model, [points(16, k) for k in range(3)])
    assert opt.noise_scale is None
