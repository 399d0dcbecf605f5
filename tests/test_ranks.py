"""Any number of ranks is one rank on all their samples. Ranks are threads here; test_gloo.py has processes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import natgrad
from helpers import OPTIMIZERS, Mixed, Net, backward, clone, made, train, weights
from multi import check, run, share
from natgrad.parallel import World, run_threads

ADAPTIVE = natgrad.Adaptive(tolerance=0.5, at=24)


@pytest.fixture(params=[False, True], ids=["whole layers", "split layers"])
def split(request, monkeypatch):
    """Whether layers as small as these are worth being split over ranks."""
    if request.param:
        monkeypatch.setattr("natgrad.parallel.placement.WORTH", 0)
    return request.param


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o.__name__)
def test_ranks_end_with_the_weights_of_one(optimizer, ranks, split, double):
    batches = [Mixed.batch(24, k) for k in range(20)]

    def build(model, world):
        options = {"lr": 0.02, "damping": 0.03, "rows_per_dim": None, "refresh": ADAPTIVE, "weight_decay": 1e-3}
        return made(optimizer, model, world=world, **options)

    results = check(ranks, Mixed(), batches, build)
    assert {c.owner for c in results[0][1].cells} == set(range(ranks))
    assert max(results[0][1].intervals().values()) > 1  # staleness took part
    assert any(c.split for c in results[0][1].cells) == (split and optimizer is not natgrad.SENG)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o.__name__)
def test_without_loose_parameters(optimizer, double):
    batches = [Net.batch(24, k) for k in range(8)]

    def build(model, world):
        return made(optimizer, model, lr=0.02, damping=0.03, rows_per_dim=None, refresh=ADAPTIVE, world=world)

    check(3, Net(), batches, build)


@pytest.mark.parametrize(
    "options",
    [
        {"length": natgrad.trust},
        {"length": natgrad.KLClip(1e-3)},
        {"length": natgrad.MeasuredChange(1e-3, first=2.0, least=1e-6)},
        {"length": natgrad.MeasuredChange(1e-3, least=1e-6), "rule": natgrad.Momentum(before=True)},
        {"rule": natgrad.Momentum(before=True, coefficient=natgrad.optim.tied)},
        {"rescale": "always"},
        {"max_norm": 0.1},
        {"ema_decay": 0.5, "refresh": 2},
        {"curvature": natgrad.LayerBlocks(natgrad.curvature.EigenKronecker, natgrad.curvature.Full)},
    ],
    ids=lambda o: "-".join(o),
)
def test_directions_and_lengths_over_ranks(options, split, double):
    batches = [Net.batch(24, k) for k in range(5)]

    def build(model, world):
        return natgrad.SPNGD(model, **{"lr": 0.02, "damping": 0.03, "rows_per_dim": None, "world": world, **options})

    check(2, Net(), batches, build)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("averaged", [False, True], ids=["local", "averaged"])
@pytest.mark.parametrize("optimizer", [k for k in OPTIMIZERS if k is not natgrad.NLCG], ids=lambda o: o.__name__)
def test_the_mean_loss_over_ranks_bounds_a_step(optimizer, averaged, reduction, double):
    """Steps are held back by a loss that is told of which every rank has a share, and end with the weights of one."""

    start = Mixed()

    def train_alike(world):
        model, held = clone(start), []
        opt = made(optimizer, model, lr=0.3, damping=0.03, rows_per_dim=None, world=world, reduction=reduction)
        for k in range(6):
            x, y = share(Mixed.batch(24, k), world)
            loss = F.cross_entropy(model(x), y, reduction=reduction)
            loss.backward()
            if averaged:
                world.mean([p.grad for p in model.parameters()])
            opt.step(loss=loss * 1e-3)
            opt.zero_grad()
            held.append(opt.last_step.held)
        return weights(model), held

    alone, held = train_alike(World())
    assert max(held[2:]) < 1
    for ranks in (2, 3):
        for there, told in run_threads(ranks, train_alike):
            assert told == pytest.approx(held, rel=1e-7)
            assert torch.allclose(there, alone, rtol=0, atol=1e-9)


def test_a_loss_that_some_ranks_are_not_told_bounds_nothing(double):
    start = Mixed()

    def work(world):
        model = clone(start)
        opt = natgrad.SPNGD(model, lr=0.3, world=world)
        loss = backward(model, share(Mixed.batch(24, 0), world))
        opt.step(loss=loss * 1e-6) if world.rank else opt.step()
        return opt.last_step.held

    assert run_threads(2, work) == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_directions_may_be_gathered_instead_of_weights(dtype):
    torch.manual_seed(0)
    batches = [(x.to(dtype), y) for x, y in (Net.batch(24, k) for k in range(5))]
    model = Net().to(dtype)
    ends = []
    for gather in ("weights", "directions"):

        def build(mine, world, gather=gather):
            return natgrad.KFAC(
                mine, lr=0.02, refresh=2, rows_per_dim=None, gather=gather, rescale="shrink", world=world
            )

        results = run(3, model, batches, build)
        assert all(torch.equal(final, results[0][0]) for final, _ in results)
        ends.append(results[0][0])
    assert torch.equal(*ends)


class Branches(nn.Module):
    """The sign of the first input says which of two layers a sample takes; either may be without samples."""

    def __init__(self):
        super().__init__()
        self.first, self.body, self.left, self.right, self.head = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, x):
        h = torch.tanh(self.body(torch.tanh(self.first(x))))
        out = torch.zeros_like(h)
        for side, layer in ((x[:, 0] < 0, self.left), (x[:, 0] >= 0, self.right)):
            if side.any():
                out = out.index_put((side.nonzero()[:, 0],), layer(h[side]))
        return self.head(out)


def sided(n, seed):
    """The first half of the samples go left, the second half right."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    x[:, 0] = x[:, 0].abs() * torch.where(torch.arange(n) < n // 2, -1, 1)
    return x, torch.randint(4, (n,), generator=generator)


def test_layers_unused_on_some_ranks(double):
    batches = [sided(16, k) for k in range(6)]

    def build(model, world):
        return natgrad.SPNGD(model, lr=0.05, damping=0.03, rows_per_dim=None, refresh=1, world=world)

    check(2, Branches(), batches, build)
    check(4, Branches(), batches, build)


def test_more_ranks_than_layers(double):
    batches = [(torch.randn(12, 4), torch.randint(3, (12,))) for _ in range(4)]

    def build(model, world):
        return natgrad.SPNGD(model, lr=0.05, rows_per_dim=None, world=world)

    check(3, nn.Sequential(nn.Linear(4, 3)), batches, build)


@pytest.mark.parametrize("build_model", [lambda: nn.Bilinear(4, 4, 3), lambda: nn.LayerNorm(4)], ids=["loose", "norm"])
def test_models_with_nothing_to_measure(build_model, double):
    """No hook is ever attached, and gradients are averaged all the same."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.only = build_model()

        def forward(self, x):
            return self.only(x, x) if isinstance(self.only, nn.Bilinear) else self.only(x)

    batches = [(torch.randn(12, 4), torch.randint(3, (12,))) for _ in range(4)]
    check(2, Twice(), batches, lambda model, world: natgrad.KFAC(model, lr=0.05, world=world))


def test_a_head_that_starts_at_zero(double):
    """Its gradients sum to zero exactly on every rank, and are unlike all the same."""
    model = nn.Sequential(nn.Linear(4, 4))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    batches = [(torch.randn(16, 4).round(), torch.randint(4, (16,))) for _ in range(4)]
    check(2, model, batches, lambda model, world: natgrad.SPNGD(model, lr=0.05, rows_per_dim=None, world=world))


@pytest.mark.parametrize("first", [True, False])
def test_a_gradient_that_is_not_finite_on_one_rank_skips_on_all(first, double):
    def work(world):
        torch.manual_seed(0)
        model = Net()
        opt = natgrad.SPNGD(model, lr=0.02, rows_per_dim=None, world=world)
        if not first:
            train(opt, model, [share(Net.batch(8, 0), world)])
        before, steps = weights(model), [float(s["step"]) for s in opt.state.values()]
        x, y = share(Net.batch(8, 1), world)
        if world.rank == 1:
            x = x * float("inf")
        backward(model, (x, y))
        opt.step()
        opt.zero_grad()
        assert torch.equal(weights(model), before)
        assert opt.skipped == 1
        assert [float(s["step"]) for s in opt.state.values()] == steps
        train(opt, model, [share(Net.batch(8, k), world) for k in (2, 3)])
        assert not torch.equal(weights(model), before)
        return weights(model)

    results = run_threads(2, work)
    assert torch.equal(results[0], results[1])
    assert bool(torch.isfinite(results[0]).all())


def test_buffers_start_alike():
    def work(world):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        model[1].running_mean.fill_(world.rank)
        model[1].num_batches_tracked.fill_(world.rank)
        natgrad.SPNGD(model, lr=0.1, world=world)
        return model[1].running_mean.sum().item(), int(model[1].num_batches_tracked)

    assert run_threads(3, work) == [(0.0, 0)] * 3


def test_a_world_says_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"gradients='ddp'.*\"local\""):
        World(gradients="ddp")
