"""Mixed precision: loss scaling changes nothing, overflows skip a step and poison nothing, bf16 just works."""

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn import functional as F
from torch.testing import assert_close

import natgrad
from helpers import Net, backward, clone, mlp, points, statistic, train, weights

BATCHES = [points(16, k) for k in range(5)]


def spngd(model, **options):
    return natgrad.SPNGD(model, **{"lr": 0.05, "rows_per_dim": None, "refresh": 2, **options})


def scaled(model, opt, scaler, batches, between=lambda: None, spoil=()):
    for k, (x, y) in enumerate(batches):
        loss = F.cross_entropy(model(x), y)
        scaler.scale(loss * (float("inf") if k in spoil else 1)).backward()
        between()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()


@pytest.mark.parametrize("start", [1.0, 2.0**4, 2.0**16])
def test_a_scaled_loss_gives_the_same_steps(start):
    model = mlp()
    other = clone(model)
    train(spngd(model), model, BATCHES)
    opt = spngd(other)
    scaled(other, opt, GradScaler("cpu", init_scale=start, growth_interval=2), BATCHES)
    assert_close(weights(other), weights(model))
    assert opt.skipped == 0


def test_statistics_are_unscaled():
    model = mlp()
    other = clone(model)
    opts = spngd(model, lr=1e-9), spngd(other, lr=1e-9)
    train(opts[0], model, BATCHES[:1])
    scaled(other, opts[1], GradScaler("cpu", init_scale=1024.0), BATCHES[:1])
    for name in ("0", "2"):
        for key in "AG":
            assert_close(statistic(opts[1], name, key), statistic(opts[0], name, key))


@pytest.mark.parametrize("first", [True, False])
def test_an_overflow_skips_everything_and_poisons_nothing(first):
    model = mlp()
    other = clone(model)
    good = BATCHES[:2]
    train(spngd(model), model, good)
    opt = spngd(other)
    scaler = GradScaler("cpu", init_scale=8.0)
    order = [BATCHES[3], *good] if first else [good[0], BATCHES[3], good[1]]
    scaled(other, opt, scaler, order, spoil=(0 if first else 1,))
    assert opt.skipped == 1
    assert scaler.get_scale() == 4.0
    assert_close(weights(other), weights(model))
    assert {float(s["step"]) for s in opt.state.values()} == {2.0}


def test_unscaling_by_hand_with_the_scaler_known():
    model = mlp()
    other = clone(model)
    clipped = spngd(model, max_norm=0.1)
    train(clipped, model, BATCHES)
    scaler = GradScaler("cpu", init_scale=64.0)
    opt = spngd(other, scaler=scaler)

    def clip():
        scaler.unscale_(opt)
        assert float(nn.utils.clip_grad_norm_(other.parameters(), 0.1)) > 0.1

    scaled(other, opt, scaler, BATCHES, clip)
    assert_close(weights(other), weights(model))


def test_the_scaler_known_and_nobody_unscales():
    model = mlp()
    other = clone(model)
    train(spngd(model), model, BATCHES)
    scaler = GradScaler("cpu", init_scale=64.0)
    scaled(other, spngd(other, scaler=scaler), scaler, BATCHES)
    assert_close(weights(other), weights(model))


def test_an_overflow_with_the_scaler_known():
    model = mlp()
    other = clone(model)
    train(spngd(model), model, BATCHES[:2])
    scaler = GradScaler("cpu", init_scale=8.0)
    opt = spngd(other, scaler=scaler)
    scaled(other, opt, scaler, [BATCHES[0], BATCHES[3], BATCHES[1]], lambda: scaler.unscale_(opt), spoil=(1,))
    assert_close(weights(other), weights(model))


def test_unscaling_by_hand_without_the_scaler_is_refused():
    model = mlp()
    opt, scaler = spngd(model), GradScaler("cpu", init_scale=64.0)
    with pytest.raises(ValueError, match="scaler="):
        scaled(model, opt, scaler, BATCHES[:1], lambda: scaler.unscale_(opt))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("first", [True, False])
def test_a_gradient_that_is_not_finite_skips_the_step(value, first):
    model = mlp()
    other = clone(model)
    train(spngd(model), model, BATCHES[:2])
    opt = spngd(other)
    for k, batch in enumerate([None, *BATCHES[:2]] if first else [BATCHES[0], None, BATCHES[1]]):
        before = weights(other)
        backward(other, BATCHES[4] if batch is None else batch)
        if batch is None:
            other[0].weight.grad[0, 0] = value
        opt.step()
        opt.zero_grad()
        assert torch.equal(before, weights(other)) == (batch is None), k
    assert opt.skipped == 1
    assert_close(weights(other), weights(model))


def test_a_skipped_step_leaves_no_statistics_though_only_the_model_is_cleared():
    model = mlp()
    other = clone(model)
    train(spngd(model), model, BATCHES[:1])
    opt = spngd(other)
    backward(other, BATCHES[3])
    other[0].weight.grad[0, 0] = float("nan")
    opt.step()
    other.zero_grad()
    backward(other, BATCHES[0])
    opt.step()
    assert_close(weights(other), weights(model))


def test_statistics_that_overflow_are_dropped_though_gradients_do_not():
    """Inputs of 3e19: squares leave single precision, gradients do not."""
    model = mlp()
    opt = spngd(model, refresh=1)
    train(opt, model, BATCHES[:1])
    kept = statistic(opt, "0", "A").clone()
    x, y = BATCHES[1]
    with torch.no_grad():
        model[0].weight.mul_(1 / 3e19)
    backward(model, (x * 3e19, y))
    opt.step()
    opt.zero_grad()
    assert opt.skipped == 0
    assert opt.engine.dropped > 0
    assert torch.equal(statistic(opt, "0", "A"), kept)
    assert bool(torch.isfinite(weights(model)).all())


@pytest.mark.parametrize("kind", [natgrad.SPNGD, natgrad.KFAC])
def test_bf16_autocast(kind):
    model = Net()
    x, y = Net.batch(32, 0)
    opt = kind(model, lr=0.03, damping=0.03)
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x.float()), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert statistic(opt, "conv", "A").dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    """Small steps add up in the masters though each is lost in the parameter."""
    model = mlp().to(dtype)
    opt = natgrad.SPNGD(model, lr=1e-4, rows_per_dim=None, momentum=0.0)
    start, total = weights(model), torch.zeros(len(weights(model)))
    losses = []
    for _ in range(60):
        x, y = points(16, 0, dtype)
        loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    total = weights(model).float() - start.float()
    assert statistic(opt, "0", "A").dtype == torch.float32
    assert losses[-1] < losses[0]
    assert float((total != 0).float().mean()) > 0.5


def test_a_half_precision_weight_that_somebody_sets_stays_set():
    model = mlp().bfloat16()
    opt = natgrad.SPNGD(model, lr=1e-4, rows_per_dim=None)
    train(opt, model, [points(16, 0, torch.bfloat16)])
    with torch.no_grad():
        model[0].weight.fill_(0.25)
    train(opt, model, [points(16, 1, torch.bfloat16)])
    assert (model[0].weight.float() - 0.25).abs().max().item() < 0.05
