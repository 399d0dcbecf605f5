"""How long NLCG's steps are: the answer to the loss, the minimum along a line, weight decay and pre-scaling."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import natgrad
from helpers import backward, clone, mlp, points, weights
from natgrad.optim.line_search import TABLE, SearchMemory, answer, quadratic


def test_the_table_at_its_edges():
    for tau in (1.0, 2.0):
        for (edge, shrink, undo), above in zip(TABLE, [(None, 0.5, 0.9), *TABLE]):
            assert answer(1 + tau * (edge + 1e-6), tau) == (shrink, undo)
            at = answer(1 + tau * edge, tau)
            below = TABLE[TABLE.index((edge, shrink, undo)) + 1][1:] if edge > 0.01 else (1.0, 0.0)
            assert at in (below, (shrink, undo))  # to rounding of the edge
            assert above[1] <= shrink
        assert answer(1 + 0.0099 * tau, tau) is None
        assert answer(9.0, tau) == (0.5, 0.9)
    assert answer(1.01, 1.0) == (1.0, 0.0)


def test_a_loss_that_grew_by_a_fifth_halves_the_step_and_takes_back(double):
    model = mlp()
    opt = natgrad.NLCG(model, lr=0.1, preconditioner=None, step=natgrad.Scheduled("online"))
    batch = points(8, 0, torch.float64)
    for k, loss in enumerate((1.0, 2.0)):
        before = weights(model)
        backward(model, batch)
        last = kept(opt)
        opt.step(loss=loss if k == 0 else 1.2 * 0.7 / (1 - 1.2 * 0.3))  # L / (.7 + .3 L) = 1.2
        opt.zero_grad()
    assert opt.multiplier == 0.5
    assert_close(weights(model) - before, -0.1 * (0.1 * 0.5 * kept(opt) - 0.9 * last))


def kept(opt):
    parts = [cell.layer.unpack(opt.state[cell.layer.parameters[0]]["nlcg_direction"]) for cell in opt.cells]
    return torch.cat([t.flatten() for row in parts for t in row])


@pytest.mark.parametrize(("feedback", "grow"), [("step", 1.05), ("online", 1.02)])
def test_the_multiplier_stays_between_its_limits(feedback, grow):
    search, memory = natgrad.Scheduled(feedback, period=5), SearchMemory()
    for k in range(200):
        memory = search.hear(SearchMemory(**{**vars(memory), "steps": k}), 1.5**k if k < 100 else 1.5**99)
        assert 1e-4 <= memory.multiplier <= 1
        if k == 99:
            assert memory.multiplier == 1e-4
    ends = [
        search.hear(SearchMemory(**{**vars(memory), "steps": s, "multiplier": m}), 0.0)
        for s, m in ((5, 0.5), (5, 0.99))
    ]
    assert [e.multiplier for e in ends] == pytest.approx([0.5 * grow, 1.0])


def test_losses_below_zero_say_nothing():
    search = natgrad.Scheduled("online")
    memory = search.hear(search.hear(SearchMemory(), -1.0), -2.0)
    assert (memory.multiplier, memory.undone) == (1.0, 0.0)


def test_the_curvature_along_a_line_is_gauss_newtons(double):
    """By forward differences, against the Jacobian and the Hessian of cross entropy in the logits."""
    z, J = torch.randn(6, 4), torch.randn(6, 4)
    p = z.softmax(1)
    H = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    assert_close(quadratic("softmax", z, J), torch.einsum("nc,ncd,nd->", J, H, J))
    seen = torch.autograd.functional.hessian(lambda v: F.cross_entropy(v, torch.tensor([1])), z[:1])
    assert_close(quadratic("softmax", z[:1], J[:1]), torch.einsum("nc,ncmd,md->", J[:1], seen, J[:1]))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_curvature_step_is_the_minimum_of_the_model(reduction, double):
    model, batch = mlp(), points(12, 0, torch.float64)
    params = dict(model.named_parameters())
    before = weights(model)
    loss = backward(model, batch, reduction=reduction)
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    pieces = {n: t.view_as(p) for (n, p), t in zip(params.items(), g.split([p.numel() for p in params.values()]))}
    call = lambda p: torch.func.functional_call(model, p, batch[0])  # noqa: E731
    z, J = torch.func.jvp(call, ({k: v.detach() for k, v in params.items()},), (pieces,))
    scale = 1 if reduction == "sum" else 1 / 12
    expected = float(g.dot(g) / (quadratic("softmax", z.detach(), J.detach()) * scale + 1e-3 * g.dot(g)))
    opt = natgrad.NLCG(model, preconditioner=None, step=natgrad.CurvatureStep(change=None), reduction=reduction)
    opt.step(forward=lambda: model(batch[0]))
    assert_close(before - weights(model), expected * g, rtol=1e-5, atol=1e-9)
    assert F.cross_entropy(model(batch[0]), batch[1], reduction=reduction) < loss


def test_weight_decay_is_a_part_of_the_loss(double):
    """In the gradient, in the loss that is told and in the curvature: as if the penalty were written out."""

    def written(model):
        return 0.05 * sum(p.square().sum() for p in model.parameters())

    for line in (False, True):
        start, batches = mlp(), [points(12, k, torch.float64) for k in range(7)]
        ends = []
        for decay in (0.1, 0.0):
            model = clone(start)
            search = natgrad.CurvatureStep(mu=0.1 - decay, limit=9.0) if line else natgrad.Scheduled("step", period=2)
            opt = natgrad.NLCG(model, lr=0.9, weight_decay=decay, step=search)
            for x, y in batches:
                opt.zero_grad()
                loss = F.cross_entropy(model(x), y) + (0.0 if decay else written(model))
                loss.backward()
                opt.step(forward=lambda m=model, v=x: m(v)) if line else opt.step(loss=loss)
            ends.append((weights(model), opt.memory.average))
        assert_close(ends[0][0], ends[1][0], rtol=1e-6, atol=1e-8)
        assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-8)


def test_pre_scaling_is_the_releases(double):
    model, batch = mlp(), points(8, 0, torch.float64)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, batch)
    grads = [p.grad.clone() for p in model.parameters()]
    natgrad.NLCG(model, lr=1.0, prescale=0.01).step(loss=1.0)
    for p, w, g in zip(model.parameters(), before, grads):
        expected = g * 0.01 * w.norm() / (g.norm() + 1e-8 + 0.1 * 0.01 * w.norm())
        assert_close(w - p.detach(), expected)
