"""The papers' update rules against themselves written out."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import natgrad
from helpers import Net, backward, clone, train, weights
from multi import check

LR, DAMPING = (0.1, 0.07, 0.02), 0.05


def model():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batch(k):
    generator = torch.Generator().manual_seed(k)
    return torch.randn(12, 5, generator=generator).double(), torch.randint(3, (12,), generator=generator)


def spngd(net, **options):
    return natgrad.SPNGD(
        net, **{"lr": LR[0], "damping": DAMPING, "rows_per_dim": None, "refresh": 1, "length": natgrad.plain, **options}
    )


def packed(layer):
    return torch.cat([layer.weight, layer.bias[:, None]], 1).detach().clone()


def natural_gradients(net, k):
    """U of both layers, [out, in + 1], from an optimizer that has seen nothing else."""
    net = clone(net)
    opt = spngd(net, momentum=0.0)
    backward(net, batch(k))
    before = [packed(m) for m in (net[0], net[2])]
    opt.step()
    return [(b - packed(m)) / LR[0] for b, m in zip(before, (net[0], net[2]))]


def rescaled(w):
    weight = w[:, :-1]
    return torch.cat([weight * (math.sqrt(2 * len(weight)) / (weight.norm() + 1e-9)), w[:, -1:]], 1)


def papers(displaced):
    """w <- w - eta U + m v, then rescaling (SP-NGD eq. 22-24), with v what the weight moved by, or what it was told."""
    net = model()
    v = [torch.zeros(()), torch.zeros(())]
    for k, lr in enumerate(LR):
        naturals = natural_gradients(net, k)
        for place, (layer, u) in enumerate(zip((net[0], net[2]), naturals)):
            before = packed(layer)
            told = -lr * u + 0.9 * lr / LR[0] * v[place]
            after = rescaled(before + told)
            v[place] = after - before if displaced else told
            layer.weight.data.copy_(after[:, :-1])
            layer.bias.data.copy_(after[:, -1])
    return weights(net)


@pytest.mark.parametrize("displaced", [False, True])
def test_tied_momentum_and_rescaling_are_the_papers(displaced):
    net = model()
    rule = natgrad.Momentum(coefficient=natgrad.optim.tied, displaced=displaced)
    opt = spngd(net, momentum=0.9, rule=rule, rescale="always")
    for k, lr in enumerate(LR):
        opt.param_groups[0]["lr"] = lr
        backward(net, batch(k))
        opt.step()
        opt.zero_grad()
    assert_close(weights(net), papers(displaced), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(papers(True), papers(False))


def test_displacements_over_ranks(double):
    def build(net, world):
        rule = natgrad.Momentum(displaced=True)
        return spngd(net, momentum=0.9, rule=rule, rescale="shrink", world=world)

    check(2, model(), [batch(k) for k in range(4)], build)


def test_gradients_have_no_displacement():
    with pytest.raises(ValueError, match="leave one out"):
        natgrad.Momentum(before=True, displaced=True)


def test_a_new_damping_acts_at_once_by_eigenvectors():
    """Nothing is measured or inverted again, and the step is the one of a fresh inverse at this damping."""
    ends = {}
    for matrix in (natgrad.curvature.Kronecker, natgrad.curvature.EigenKronecker):
        net = model()
        opt = spngd(net, refresh=100, curvature=natgrad.LayerBlocks(matrix), momentum=0.0)
        for damping in (DAMPING, 3 * DAMPING, 3.1 * DAMPING):  # the last is too near for Cholesky's to be made anew
            opt.param_groups[0]["damping"] = damping
            backward(net, batch(0))
            opt.step()
            opt.zero_grad()
            ends.setdefault(matrix, []).append(weights(net))
        used = {float(cell.state()["A_damping"]) for cell in opt.cells}
        assert used == ({DAMPING} if matrix is natgrad.curvature.EigenKronecker else {3 * DAMPING})
    plain, eigen = ends.values()
    for k in (0, 1):
        assert_close(eigen[k], plain[k], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(eigen[2], plain[2], rtol=1e-6)


@pytest.mark.parametrize("kind", [natgrad.curvature.UnitWise, natgrad.curvature.Full])
def test_norms_have_a_damping_of_their_own(kind):
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()

    def moved(damping, coefficient):
        net = clone(start)
        blocks = natgrad.LayerBlocks(norm=partial(kind, coefficient=coefficient))
        opt = spngd(net, curvature=blocks, momentum=0.0, damping=damping)
        backward(net, batch(0))
        opt.step()
        return [p.detach() - q.detach() for p, q in zip(net.parameters(), start.parameters())]

    coefficient, damping = moved(0.01, 16.0), moved(0.16, 1.0)
    for k, (mine, theirs) in enumerate(zip(coefficient, damping)):
        assert torch.allclose(mine, theirs, rtol=1e-9) == (k in (2, 3))  # the norm's, and nothing else's


def test_a_full_block_that_is_too_large_is_unit_wise():
    net = nn.Sequential(nn.Linear(5, 40), nn.LayerNorm(40))
    for limit, name in ((80, "full"), (79, "unit-wise")):
        opt = natgrad.SPNGD(net, lr=0.1, curvature=natgrad.LayerBlocks(norm=natgrad.curvature.Full), max_size=limit)
        assert [row.curvature for row in opt.coverage()][1] == name


@pytest.mark.parametrize("before", [False, True])
def test_the_predicted_change_of_repeated_directions(before):
    """While curvature stands still, the summed gradients are what the direction undoes, so d . h = d^T (F + l I) d."""
    net = Net().double()
    rule = natgrad.Momentum(before=before)
    length = natgrad.KLClip(1e-3)
    opt = natgrad.SPNGD(net, lr=0.5, momentum=0.8, rows_per_dim=None, refresh=100, rule=rule, length=length)
    for k in range(4):
        start = weights(net)
        train(opt, net, [Net.batch(8, k)])
    change = 0.0
    for cell in opt.cells:
        state = cell.state()
        direction = cell.precondition(state["gradients"], 1e-3)
        if not before:
            assert_close(state["momentum"], direction, rtol=1e-9, atol=1e-12)
        change += 0.25 * float((direction * state["gradients"]).sum())
    assert change > 1e-3  # it was shortened, by this factor
    taken = torch.cat(
        [t.flatten() for c in opt.cells for t in c.layer.unpack(c.precondition(c.state()["gradients"], 1e-3))]
    )
    assert_close(start - weights(net), 0.5 * taken * math.sqrt(1e-3 / change), rtol=1e-7, atol=1e-12)
