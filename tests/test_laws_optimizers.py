"""What must hold for every optimizer: it trains, covers everything, and a batch is the sum of its parts."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import natgrad
from helpers import OPTIMIZERS, Mixed, Net, backward, clone, hooks, made, mlp, points, statistic, train, weights
from natgrad.parallel import run_threads

every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda o: o.__name__)


def test_optimizers_are_found_and_public():
    assert {natgrad.SPNGD, natgrad.KFAC} <= set(OPTIMIZERS)
    for kind in OPTIMIZERS:
        assert getattr(natgrad, kind.__name__) is kind


@every_optimizer
@pytest.mark.parametrize("model", [Mixed, Net])
def test_it_trains_every_parameter(kind, model):
    batch = model.batch(32, 0)
    batch = tuple(t.float() if t.is_floating_point() else t for t in batch)
    model = model()
    before = [p.detach().clone() for p in model.parameters()]
    opt = made(kind, model, lr=0.1)
    losses = train(opt, model, [batch] * 25, tell=True)
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before))


@every_optimizer
@pytest.mark.parametrize("lr", [0.1, 0.3])
@pytest.mark.parametrize("model", [Mixed, Net])
def test_what_is_learnt_by_heart_stays_so_where_the_loss_is_told(kind, model, lr):
    """Gradients vanish, and curvature faster: nothing but the loss says how far a step may go."""
    for seed in range(3):
        torch.manual_seed(seed)
        batch = tuple(t.float() if t.is_floating_point() else t for t in model.batch(32, seed))
        trained = model()
        opt = kind(trained, lr=lr)
        curved = {row.layer for row in opt.coverage() if not row.curvature.startswith("none")}
        losses = train(opt, trained, [batch] * 60, tell=True)
        assert max(losses) < 1.2 * losses[0]
        assert max(losses[50:]) < 0.4 * losses[0]
        assert curved == {row.layer for row in opt.coverage() if not row.curvature.startswith("none")}


@every_optimizer
def test_gradients_that_hardly_are_numbers_leave_layers_their_curvature(kind):
    """Numbers of 1e-41 have few digits in single precision, on both sides of the checksum."""
    for scale in (1e-36, 1e-38, 1e-40, 1e-42, 1e-44):
        model = Mixed().float()
        opt = made(kind, model, lr=0.1)
        curved = [row.curvature for row in opt.coverage()]
        for seed in range(4):
            tokens, labels = Mixed.batch(32, seed)
            (F.cross_entropy(model(tokens), labels) * scale).backward()
            opt.step()
            opt.zero_grad()
        assert [row.curvature for row in opt.coverage()] == curved


@every_optimizer
def test_coverage_accounts_for_every_parameter(kind):
    model = Mixed()
    rows = made(kind, model, lr=0.1).coverage()
    assert sum(r.parameters for r in rows) == sum(p.numel() for p in model.parameters())
    loose = {r.layer: r for r in rows}["gain"]
    assert loose.curvature == ("none (plain gradient)" if kind is natgrad.NLCG else "none (adam)")
    assert "no layer is registered for Mixed" in loose.why
    for row in rows:
        assert row.why
        assert row.bytes > 0 or row.curvature == "identity"
        assert row.owner == 0


@every_optimizer
def test_coverage_tells_the_bytes_that_are_held(kind):
    model = Mixed()
    opt = made(kind, model, lr=0.1)
    train(opt, model, [Mixed.batch(8, 0)])
    for row, cell in zip(opt.coverage(), opt.cells):
        clocks = ("step", "adam_count", "scalars", "went", "stretch")
        held = [v for k, v in cell.state().items() if k not in clocks and not k.endswith(("_clock", "_damping"))]
        assert row.bytes == sum(v.numel() * v.element_size() for v in held), row.layer


@every_optimizer
def test_microbatches_are_a_batch(kind, double):
    model = Mixed()
    whole, parts = clone(model), clone(model)
    opts = [made(kind, m, lr=0.05, damping=0.03, rows_per_dim=None, refresh=2) for m in (whole, parts)]
    for k in range(5):
        x, y = Mixed.batch(24, k)
        backward(whole, (x, y))
        for part in zip(x.chunk(4), y.chunk(4)):
            (F.cross_entropy(parts(part[0]), part[1]) / 4).backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
        assert_close(weights(parts), weights(whole), rtol=1e-10, atol=1e-10)


@every_optimizer
def test_microbatches_of_a_norm_add_up_too(kind, double):
    """Unit-wise blocks square per-sample gradients, each in one micro-batch."""
    model = nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4), nn.Linear(4, 3))
    whole, parts = clone(model), clone(model)
    options = {"lr": 0.05, "rows_per_dim": None, "curvature": natgrad.optim.blocks.spngd_blocks}
    opts = [made(kind, m, **options) for m in (whole, parts)]
    for k in range(4):
        x, y = points(12, k, torch.float64)
        backward(whole, (x, y))
        for part in zip(x.split([2, 2, 5, 3]), y.split([2, 2, 5, 3])):
            (F.cross_entropy(parts(part[0]), part[1], reduction="sum") / 12).backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
    assert_close(weights(parts), weights(whole), rtol=1e-10, atol=1e-10)


@every_optimizer
@pytest.mark.parametrize("weighed", ["by samples", "by ranks"])
def test_ranks_with_unlike_shares_are_one_rank_with_the_mean_of_their_losses(kind, weighed, double):
    """3 and 5 samples. Means of shares, times 2 n / 8, which makes their mean that of the batch; or as they are."""
    sizes = (3, 5)
    start = Mixed()
    options = {"lr": 0.02, "damping": 0.03, "rows_per_dim": None, "refresh": 2, "weight_decay": 1e-3}

    def work(world):
        model = clone(start)
        opt = made(kind, model, world=world, **options)
        for k in range(5):
            x, y = Mixed.batch(sum(sizes), k)
            if world.size > 1:
                x, y = (t.split(sizes)[world.rank] for t in (x, y))
            own = F.cross_entropy(model(x), y, reduction="none")
            shares = own.split(sizes) if world.size == 1 else [own]
            factors = [2 * len(share) / sum(sizes) if weighed == "by samples" else 1.0 for share in shares]
            (sum(f * share.mean() for f, share in zip(factors, shares)) / len(shares)).backward()
            opt.step()
            opt.zero_grad()
        return weights(model)

    (expected,) = run_threads(1, work)
    for found in run_threads(2, work):
        assert_close(found, expected, rtol=1e-9, atol=1e-9)


@every_optimizer
def test_ranks_that_have_run_out_leave_the_statistics_of_the_others(kind, double):
    """Two ranks of three still have batches (torch's Join): statistics are those of their samples."""
    start = Net()
    batch = Net.batch(12, 0)

    def work(world):
        model = clone(start)
        opt = made(kind, model, lr=0.02, damping=0.03, rows_per_dim=None, world=world)
        if world.size == 1:
            backward(model, batch)
        else:
            opt.gradients.active = 2
            if world.rank < 2:
                backward(model, tuple(t.chunk(2)[world.rank] for t in batch))
        opt.step()
        return weights(model)

    (expected,) = run_threads(1, work)
    for found in run_threads(3, work):
        assert_close(found, expected, rtol=1e-9, atol=1e-9)


@every_optimizer
def test_a_summed_loss_has_the_statistics_of_a_mean(kind, double):
    values = {}
    for reduction in ("mean", "sum"):
        torch.manual_seed(0)
        model = Net()
        opt = made(kind, model, lr=1e-3, rows_per_dim=None, reduction=reduction)
        backward(model, Net.batch(12, 0), reduction=reduction)
        opt.step()
        values[reduction] = [statistic(opt, c.name, m.key) for c in opt.cells for m in c.curvature.statistics]
    assert len(values["sum"]) >= 3
    for mean, total in zip(values["mean"], values["sum"]):
        assert_close(total, mean, rtol=1e-10, atol=1e-14)


@every_optimizer
def test_the_same_seed_gives_the_same_run(kind):
    """With bounded samples, on data large enough for draws to matter."""

    def final(seed):
        torch.manual_seed(0)
        model = mlp()
        train(made(kind, model, lr=0.05, rows_per_dim=1, seed=seed), model, [points(64, k) for k in range(4)])
        return weights(model)

    assert torch.equal(final(0), final(0))
    assert not torch.equal(final(0), final(1))


@every_optimizer
def test_groups_hold_numbers_and_state_holds_tensors(kind):
    model = Mixed()
    opt = made(kind, model, lr=0.1)
    train(opt, model, [Mixed.batch(8, 0)] * 2)
    for group in opt.param_groups:
        assert all(isinstance(v, (int, float)) for k, v in group.items() if k != "params")
    for state in opt.state.values():
        assert "step" in state
        assert all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items())
    places = sorted((v.data_ptr(), v.numel() * v.element_size()) for s in opt.state.values() for v in s.values())
    assert all(start + size <= after for (start, size), (after, _) in pairwise(places))  # nothing aliases
    assert all(v.is_contiguous() for s in opt.state.values() for v in s.values())


@every_optimizer
def test_a_closure_is_called_once_and_its_loss_returned(kind):
    model, calls = mlp(), []
    opt = made(kind, model, lr=0.1)

    def closure():
        opt.zero_grad()
        calls.append(backward(model, points(8, 0)))
        return calls[-1]

    assert opt.step(closure) is calls[0]
    assert len(calls) == 1
    assert opt.step(None) is None


@every_optimizer
def test_torch_schedulers_and_groups_work(kind):
    model = mlp()
    groups = [{"params": [model[0].weight, model[2].weight], "lr": 0.2}, {"params": [model[0].bias, model[2].bias]}]
    opt = made(kind, model, lr=0.1, momentum=0.0, params=groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: [1.0, 0.5, 0.0][k])
    assert [g["lr"] for g in opt.param_groups] == [0.2, 0.1]
    for k in range(3):
        before = weights(model)
        train(opt, model, [points(8, k)])
        schedule.step() if k < 2 else None
        assert torch.equal(weights(model), before) == (k == 2)  # lr 0 moves nothing


@every_optimizer
def test_each_parameter_has_its_own_groups_lr(kind, double):
    """The weight and the bias of one layer in two groups."""
    start = mlp()
    moves = []
    for lrs in ((0.1, 0.1), (0.1, 0.03)):
        model = clone(start)
        biases = [p for p in model.parameters() if p.dim() == 1]
        others = [p for p in model.parameters() if p.dim() > 1]
        groups = [{"params": others, "lr": lrs[0]}, {"params": biases, "lr": lrs[1]}]
        train(made(kind, model, lr=0.1, rows_per_dim=None, params=groups), model, [points(8, 0, torch.float64)])
        moves.append([p.detach() - q.detach() for p, q in zip(model.parameters(), start.parameters())])
    for p, one, other in zip(start.parameters(), *moves):
        assert_close(other, one * (0.3 if p.dim() == 1 else 1.0))


@every_optimizer
def test_hooks_come_and_go(kind):
    model = mlp()
    opt = made(kind, model, lr=0.1, refresh=2)
    present = []
    for k in range(5):
        present.append(hooks(model) > 0)
        train(opt, model, [points(8, k)])
    assert present == [True, False, True, False, True]


@every_optimizer
def test_parameters_left_out_of_params_stay(kind):
    model = mlp()
    kept = model[2].weight.detach().clone()
    opt = made(kind, model, lr=0.1, params=model[0].parameters())
    train(opt, model, [points(8, 0)] * 2)
    assert torch.equal(model[2].weight, kept)
    assert [r.layer for r in opt.coverage()] == ["0"]


@every_optimizer
def test_a_scalar_batch_dimension_and_a_batch_of_one(kind):
    model = mlp()
    opt = made(kind, model, lr=0.01)
    train(opt, model, [points(1, 0), points(1, 1)])
    F.cross_entropy(model(torch.randn(4)), torch.tensor(1)).backward()
    opt.step()
    assert bool(torch.isfinite(weights(model)).all())
