"""Natural gradients in front of torch's optimizers: exact against the optimizers here, whatever else a loop does."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import natgrad
from helpers import Mixed, Net, backward, clone, mlp, points, quiet, row, said_by, weights
from natgrad.optim import KLClip
from natgrad.parallel import run_threads

BLOCKS = {
    "kfac": natgrad.kfac_blocks,
    "spngd": natgrad.spngd_blocks,
    "eigen": natgrad.optim.blocks.LayerBlocks(natgrad.curvature.EigenKronecker, natgrad.curvature.Full),
}
SETTINGS = {"damping": 0.03, "refresh": 2, "rows_per_dim": None, "ema_decay": 0.5}


def by_preconditioner(model, batches, curvature=natgrad.kfac_blocks, momentum=0.0, clip=None, lr=0.05, **options):
    own = clone(model)
    preconditioner = natgrad.Preconditioner(
        own, curvature=curvature, clip=clip, lr=None if clip is None else lr, **SETTINGS, **options
    )
    optimizer = torch.optim.SGD(own.parameters(), lr=lr, momentum=momentum)
    for batch in batches:
        optimizer.zero_grad()
        backward(own, batch)
        preconditioner.step()
        optimizer.step()
    return weights(own)


def by_optimizer(model, batches, curvature=natgrad.kfac_blocks, momentum=0.0, clip=None, lr=0.05, **options):
    own = clone(model)
    length = natgrad.plain if clip is None else clip
    optimizer = natgrad.KFAC(own, lr=lr, momentum=momentum, curvature=curvature, length=length, **SETTINGS, **options)
    for batch in batches:
        optimizer.zero_grad()
        backward(own, batch)
        optimizer.step()
    return weights(own)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_sgd_behind_it_is_kfac(blocks, momentum, double):
    model, batches = Net(), [Net.batch(16, k) for k in range(6)]
    found = by_preconditioner(model, batches, BLOCKS[blocks], momentum)
    assert_close(found, by_optimizer(model, batches, BLOCKS[blocks], momentum), rtol=1e-12, atol=1e-13)
    assert not torch.equal(found, weights(model))


@pytest.mark.parametrize("limit", [1e-5, 1e3])
def test_clipped_it_is_clipped_kfac(limit, double):
    """Far below and far above the change that the steps would make."""
    model, batches = mlp(), [points(16, k, torch.float64) for k in range(6)]
    found = by_preconditioner(model, batches, clip=KLClip(limit))
    assert_close(found, by_optimizer(model, batches, clip=KLClip(limit)), rtol=1e-12, atol=1e-13)
    plain = by_preconditioner(model, batches)
    assert torch.allclose(found, plain, rtol=1e-9) == (limit > 1)


def test_the_rate_that_clipping_asks_for_may_follow_a_schedule(double):
    model, batch = mlp(), points(16, 0, torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    plan = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    preconditioner = natgrad.Preconditioner(
        model, clip=KLClip(1e-6), lr=lambda: optimizer.param_groups[0]["lr"], **SETTINGS
    )
    moves = []
    for _ in range(3):
        before = weights(model)
        backward(model, batch)
        preconditioner.step()
        optimizer.step()
        plan.step()
        optimizer.zero_grad()
        moves.append(float((weights(model) - before).norm()))
        assert preconditioner.last_step.change == pytest.approx(1e-6)
    assert moves[1] == pytest.approx(moves[0], rel=0.2)  # as far as the bound permits, at any learning rate


def test_parameters_without_curvature_keep_their_gradient(double):
    model = Mixed()
    preconditioner = natgrad.Preconditioner(model, **SETTINGS)
    backward(model, Mixed.batch(16, 0))
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    weights_before = weights(model)
    preconditioner.step()
    assert torch.equal(weights(model), weights_before)
    for name, p in model.named_parameters():
        changed = not torch.equal(p.grad, before[name])
        assert changed == name.startswith(("conv", "head", "embed")), name  # norms have none in K-FAC
    assert row(preconditioner, "gain").curvature == "none (plain gradient)"
    assert row(preconditioner, "gain").bytes == 0


def test_micro_batches_are_a_batch(double):
    model, batches = mlp(), [points(16, k, torch.float64) for k in range(4)]
    expected = by_preconditioner(model, batches)
    own = clone(model)
    preconditioner = natgrad.Preconditioner(own, **SETTINGS)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.05)
    for x, y in batches:
        for part in zip(x.chunk(4), y.chunk(4)):
            (F.cross_entropy(own(part[0]), part[1]) / 4).backward()
        preconditioner.step()
        optimizer.step()
        optimizer.zero_grad()
    assert_close(weights(own), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("averaged", [False, True], ids=["plain", "ddp"])
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("clip", [None, KLClip(1e-4)], ids=["as it is", "clipped"])
def test_ranks_have_the_same_gradients_as_one(ranks, averaged, clip, double):
    """Those of layers with curvature and of others, whoever averages them."""
    model, batches = Mixed(), [Mixed.batch(24, k) for k in range(4)]
    expected = quiet(by_preconditioner, model, batches, clip=clip)

    def work(world):
        own = clone(model)
        options = {} if clip is None else {"clip": clip, "lr": 0.05}
        preconditioner = natgrad.Preconditioner(own, world=world, **options, **SETTINGS)
        optimizer = torch.optim.SGD(own.parameters(), lr=0.05)
        for batch in batches:
            optimizer.zero_grad()
            backward(own, tuple(t.chunk(world.size)[world.rank] for t in batch))
            if averaged:
                world.mean([p.grad for p in own.parameters()])
            preconditioner.step()
            optimizer.step()
        return weights(own)

    results = run_threads(ranks, work)
    for found in results:
        assert torch.equal(found, results[0])
        assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_layers_that_some_ranks_do_not_use(double):
    class Forked(nn.Module):
        """Even ranks take one head, odd ones the other."""

        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

    model = Forked()

    def work(world):
        own = clone(model)
        preconditioner = natgrad.Preconditioner(own, world=world, **SETTINGS)
        for k in range(3):
            x, y = points(8, 10 * k + world.rank, torch.float64)
            own.zero_grad()
            F.cross_entropy(own.heads[world.rank](x), y).backward()
            preconditioner.step()
        return torch.cat([p.grad.flatten() for p in own.parameters()])

    first, second = quiet(run_threads, 2, work)
    assert torch.equal(first, second)
    assert first.isfinite().all()


def scaled_run(model, batches, clip=None, infinite=(), order="unscaled"):
    own = clone(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    options = {} if clip is None else {"clip": clip, "lr": 0.05}
    preconditioner = natgrad.Preconditioner(own, scaler=scaler, **options, **SETTINGS)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.05)
    for k, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(own(x), y)).backward()
        if k in infinite:
            own[0].weight.grad[0] = torch.inf
        if order == "unscaled":
            scaler.unscale_(optimizer)
        preconditioner.step()
        torch.nn.utils.clip_grad_norm_(own.parameters(), 1e9)
        scaler.step(optimizer)
        scaler.update()
    return weights(own), preconditioner


@pytest.mark.parametrize("clip", [None, KLClip(1e-5)], ids=["as it is", "clipped"])
def test_a_scaled_loss_changes_nothing(clip, double):
    model, batches = mlp(), [points(16, k, torch.float64) for k in range(5)]
    expected = by_preconditioner(model, batches, clip=clip)
    assert_close(scaled_run(model, batches, clip)[0], expected, rtol=1e-10, atol=1e-12)


def test_natural_gradients_are_linear_in_the_scale(double):
    """So without a bound on the change, step() may come before scaler.unscale_ too."""
    model, batches = mlp(), [points(16, k, torch.float64) for k in range(5)]
    found, _ = scaled_run(model, batches, order="scaled")
    assert_close(found, by_preconditioner(model, batches), rtol=1e-10, atol=1e-12)


def test_gradients_that_are_not_finite_skip_the_step(double):
    model, batches = mlp(), [points(16, k, torch.float64) for k in range(5)]
    with_one, preconditioner = scaled_run(model, batches, infinite=(1,))
    assert preconditioner.skipped == 1
    assert with_one.isfinite().all()


def test_misuse_says_what_to_do(double):
    model = mlp()
    with pytest.raises(TypeError, match=r"momentum.*the optimizer that makes the step decides it"):
        natgrad.Preconditioner(model, momentum=0.9)
    with pytest.raises(ValueError, match=r"give lr= too"):
        natgrad.Preconditioner(model, clip=KLClip(1e-3))
    with pytest.raises(ValueError, match=r"lr=0.1 is for clip= alone"):
        natgrad.Preconditioner(model, lr=0.1)
    with pytest.raises(ValueError, match=r"KLClip\(limit\)"):
        natgrad.Preconditioner(model, clip=0.01, lr=0.1)
    with pytest.raises(ValueError, match="pass the model itself"):
        natgrad.Preconditioner(model.parameters())
    for clip, call, words in (
        (None, lambda p, scaler: scaler.step(p), "unscaled twice"),
        (KLClip(1e-3), lambda p, scaler: p.step(), r"scaler.unscale_\(optimizer\) before"),
    ):
        own, scaler = clone(model), torch.amp.GradScaler("cpu")
        preconditioner = natgrad.Preconditioner(own, scaler=scaler, clip=clip, lr=clip and 0.1)
        scaler.scale(F.cross_entropy(own(points(8, 0, torch.float64)[0]), points(8, 0)[1])).backward()
        with pytest.raises(ValueError, match=words):
            call(preconditioner, scaler)
    with pytest.raises(ValueError, match="Join"):
        natgrad.Preconditioner(clone(model)).join_hook()


def test_a_resumed_run_is_the_same_run(double):
    model = mlp()
    preconditioner = natgrad.Preconditioner(model, clip=KLClip(1e-4), lr=0.05, **{**SETTINGS, "refresh": 3})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)

    def go(model, preconditioner, optimizer, steps):
        for k in steps:
            optimizer.zero_grad()
            backward(model, points(16, k, torch.float64))
            preconditioner.step()
            optimizer.step()

    go(model, preconditioner, optimizer, range(4))
    saved = copy.deepcopy((preconditioner.state_dict(), optimizer.state_dict()))
    other = clone(model)
    again = natgrad.Preconditioner(other, clip=KLClip(1e-4), lr=0.05, **{**SETTINGS, "refresh": 3})
    second = torch.optim.AdamW(other.parameters(), lr=0.05)
    again.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    go(model, preconditioner, optimizer, range(4, 9))
    go(other, again, second, range(4, 9))
    assert torch.equal(weights(model), weights(other))


def test_half_precision_parameters_have_no_master():
    model = mlp().bfloat16()
    preconditioner = natgrad.Preconditioner(model, **SETTINGS)
    backward(model, points(16, 0, torch.bfloat16))
    preconditioner.step()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    assert not any("master" in preconditioner.state[p] for p in model.parameters())


def test_drawn_labels(double):
    model, (x, y) = mlp(), points(32, 0, torch.float64)
    preconditioner = natgrad.Preconditioner(model, fisher="sampled", **SETTINGS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(8):
        output = model(x)
        preconditioner.sample(output)
        optimizer.zero_grad()  # as Lightning orders it
        loss = F.cross_entropy(output, y)
        loss.backward()
        preconditioner.step()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert preconditioner.assumed.samples == 32


def test_it_says_nothing_that_an_optimizer_would_not_say():
    assert not said_by(lambda: natgrad.Preconditioner(mlp()))
