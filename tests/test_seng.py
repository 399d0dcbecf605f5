"""SENG on whole models: its directions against dense ones, on any number of ranks."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.testing import assert_close

import natgrad
from helpers import Mixed, Net, backward, clone, train, weights
from multi import SAME, share
from natgrad.parallel import run_threads

DAMPING = 0.3


class Every(nn.Module):
    """Grouped and dense convolutions, a norm, linear layers, one of them called twice, and an embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 3)
        self.grouped = nn.Conv1d(3, 6, 3, groups=3, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.conv = nn.Conv1d(6, 20, 5, stride=3)
        self.linear = nn.Linear(20, 5)
        self.shared = nn.Linear(5, 5, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens).transpose(1, 2)
        x = torch.tanh(self.conv(torch.tanh(self.norm(self.grouped(x))))).mean(2)
        return self.shared(torch.tanh(self.shared(torch.tanh(self.linear(x)))))


@pytest.fixture
def every(double):
    torch.manual_seed(1)
    return Every()


def batch(n, k=0):
    generator = torch.Generator().manual_seed(k)
    return torch.randint(30, (n, 11), generator=generator), torch.randint(5, (n,), generator=generator)


def seng(model, **options):
    settings = {"lr": 1.0, "momentum": 0.0, "damping": DAMPING, "refresh": 1, "samples": None, "sketch": None}
    return natgrad.SENG(model, length=natgrad.plain, **{**settings, **options})


def jacobian(model, x, y):
    """Gradients of every sample's own loss [n, ...] by name, and the squared norms [n] of their logits' gradients."""
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(p, a, b):
        return F.cross_entropy(functional_call(model, p, (a[None],)), b[None])

    logits = model(x).detach()
    squares = (logits.softmax(1) - F.one_hot(y, 5)).square().sum(1)
    return vmap(grad(loss), (None, 0, 0))(parameters, x, y), squares


def parts(model):
    """The names of each layer's parameters."""
    return [[f"{n}.{k}" for k, _ in m.named_parameters()] for n, m in model.named_children()]


def dense(model, x, y, layers, improved=False, gradient=None):
    """-(lambda I + U U^T)^-1 g of each group of parameters, one behind the other; g is the mean unless given."""
    columns, squares = jacobian(model, x, y)
    result = {}
    for names in layers:
        u = torch.cat([columns[k].flatten(1) for k in names], 1)
        g = u.mean(0) if gradient is None else torch.cat([gradient[k].flatten() for k in names])
        u = (u / squares.sqrt()[:, None] if improved else u) / len(u) ** 0.5
        step = -torch.linalg.solve(u.T @ u + DAMPING * torch.eye(u.shape[1]), g)
        shapes = [columns[k].shape[1:] for k in names]
        result |= zip(names, (p.view(s) for p, s in zip(step.split([s.numel() for s in shapes]), shapes)))
    return result


def moved(model, opt, x, y):
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    backward(model, (x, y))
    opt.step()
    opt.zero_grad()
    return {k: v.detach() - before[k] for k, v in model.named_parameters()}


def agree(mine, theirs):
    for name, value in theirs.items():
        assert_close(mine[name], value, rtol=1e-10, atol=1e-10 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize("columns", ["empirical", "improved"])
@pytest.mark.parametrize("block", ["layer", "network"])
def test_a_step_is_the_dense_one(every, block, columns):
    x, y = batch(7)
    layers = parts(every) if block == "layer" else [[k for names in parts(every) for k in names]]
    expected = dense(copy.deepcopy(every), x, y, layers, columns == "improved")
    opt = seng(every, block=block, columns=columns)
    assert [row.curvature for row in opt.coverage()] == ["per-sample"] * 6
    agree(moved(every, opt, x, y), expected)


@pytest.mark.parametrize("columns", ["empirical", "improved"])
@pytest.mark.parametrize("block", ["layer", "network"])
def test_old_columns_meet_new_gradients(every, block, columns):
    """Between refreshes the gradient is that of another batch: Woodbury, not push-through."""
    opt = seng(every, block=block, columns=columns, refresh=2, lr=1e-12)
    first, second = batch(7), batch(9, 1)
    layers = parts(every) if block == "layer" else [[k for names in parts(every) for k in names]]
    moved(every, opt, *first)
    reference = copy.deepcopy(every)
    new = {k: v.mean(0) for k, v in jacobian(reference, *second)[0].items()}
    expected = dense(reference, *first, layers, columns == "improved", new)
    opt.param_groups[0]["lr"] = 1.0
    agree(moved(every, opt, *second), expected)


def test_a_bounded_number_of_samples_is_the_fisher_of_those(every, monkeypatch):
    x, y = batch(20)
    chosen = torch.tensor([1, 4, 5, 11, 17])
    monkeypatch.setattr("natgrad.sampling.stratified", lambda total, wanted, generator: chosen)
    reference = copy.deepcopy(every)
    mean = {k: v.mean(0) for k, v in jacobian(reference, x, y)[0].items()}
    expected = dense(reference, x[chosen], y[chosen], parts(every), gradient=mean)
    agree(moved(every, seng(every, samples=5), x, y), expected)


@pytest.mark.parametrize("owners", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"block": "network"}, {"columns": "improved"}, {"sketch": natgrad.curvature.CountSketch(40)}]
)
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_make_one_direction(every, ranks, options, owners):
    """Rows gathered to owners or to everybody, on shares of unequal size; also between refreshes."""
    start = every

    def work(world):
        model = clone(start)
        opt = seng(model, refresh=2, world=world, lr=0.3, max_norm=5.0, **options)
        for k in range(4):
            x, y = share(batch(12, k), world)
            backward(model, (x, y))
            opt.step()
            opt.zero_grad()
        return weights(model), opt.traffic()

    alone = run_threads(1, work)[0][0]
    results = run_threads(ranks, work, owners=owners)
    for final, traffic in results:
        assert torch.equal(final, results[0][0])
        assert ("weights" in traffic) == owners
    assert_close(results[0][0], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [natgrad.SPNGD, natgrad.KFAC])
def test_any_optimizer_may_hold_everything_everywhere(kind, double):
    start = Mixed()

    def work(world):
        model = clone(start)
        opt = kind(model, lr=0.02, damping=0.03, rows_per_dim=None, refresh=2, world=world, max_norm=1.0)
        train(opt, model, [share(Mixed.batch(24, k), world) for k in range(5)])
        return weights(model), opt.gather_state_dict()["state"].keys(), opt.traffic()

    alone = run_threads(1, work)[0][0]
    for final, saved, traffic in run_threads(3, work, owners=False):
        assert_close(final, alone, **SAME)
        assert len(saved) == len(list(start.parameters()))
        assert "weights" not in traffic


def test_averaged_gradients(every):
    """As DistributedDataParallel leaves them: only rows and weights travel."""
    start = every

    def work(world):
        model = clone(start)
        opt = seng(model, world=world, lr=0.3)
        for k in range(3):
            backward(model, share(batch(12, k), world))
            world.mean([p.grad for p in model.parameters()], "ddp")
            opt.step()
            opt.zero_grad()
        return weights(model), opt.traffic()

    (final, traffic), *_ = run_threads(2, work)
    assert "gradients" not in traffic
    assert_close(final, run_threads(1, work)[0][0], rtol=1e-10, atol=1e-10)


def test_local_directions_are_averaged(every):
    start, x, y = copy.deepcopy(every), *batch(12)
    legacy = natgrad.curvature.Legacy(10**6, 10**9, local=True)  # without its boost

    def work(world):
        model = clone(start)
        return moved(model, seng(model, world=world, legacy=legacy), *share((x, y), world))

    mine = run_threads(2, work, owners=False)[0]
    mean = {k: v.mean(0) for k, v in jacobian(start, x, y)[0].items()}
    halves = [dense(start, a, b, parts(start), gradient=mean) for a, b in zip(x.chunk(2), y.chunk(2))]
    agree(mine, {k: (halves[0][k] + halves[1][k]) / 2 for k in halves[0]})
    with pytest.raises(ValueError, match="owners=False"):
        run_threads(2, lambda world: seng(clone(start), world=world, legacy=legacy))


def test_columns_of_samples_are_as_many_as_asked_for_over_passes_and_ranks(double):
    def work(world):
        model = Net()
        opt = natgrad.SENG(model, lr=0.01, samples=10, world=world)
        for k in range(3):
            F.cross_entropy(model((b := share(Net.batch(18, k), world))[0]), b[1]).div(3).backward()
        opt.step()
        return [len(s["U_mean"]) for s in opt.state.values() if "U_mean" in s]

    for ranks in (1, 2, 3):
        owned = [n for found in run_threads(ranks, work) for n in found]
        assert len(owned) == 3
        assert all(9 <= n <= 10 for n in owned)
