"""What has no curvature trains all the same and says why; copies of a watched model are not watched."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import natgrad
from helpers import Opaque, Two, backward, clone, hooks, mlp, points, quiet, row, train, weights


def spngd(model, **options):
    return natgrad.SPNGD(model, **{"lr": 0.05, "rows_per_dim": None, "refresh": 1, **options})


class Behind(Two):
    """Its head is a kernel of its own, which no function of torch shows."""

    def forward(self, x):
        return Opaque.apply(torch.tanh(self.body(x)), self.head.weight) + self.head.bias


def test_a_weight_used_behind_our_back():
    model = Behind()
    opt = spngd(model)
    assert row(opt, "head").curvature == "kronecker"
    with pytest.warns(natgrad.NatgradWarning, match="head: its module's calls do not account for its gradient"):
        train(opt, model, [points(12, 0)])
    assert "do not account" in row(opt, "head.weight").why
    assert row(opt, "head.weight").curvature == "none (adam)"
    assert row(opt, "body").curvature == "kronecker"
    before = model.head.weight.detach().clone()
    losses = train(opt, model, [points(12, 0)] * 20)
    assert not torch.equal(model.head.weight, before)
    assert losses[-1] < losses[0]
    model = Behind()
    opt = spngd(model, strict=True)
    backward(model, points(12, 0))
    with pytest.raises(ValueError, match="strict=True"):
        opt.step()


def test_frozen_layers_and_half_frozen_layers():
    model = mlp()
    model[0].weight.requires_grad_(False)
    kept = model[0].weight.detach().clone()
    opt = spngd(model)
    assert "frozen" in row(opt, "0.bias").why
    train(opt, model, [points(12, k) for k in range(3)])
    assert torch.equal(model[0].weight, kept)
    whole = mlp()
    whole[0].requires_grad_(False)
    opt = spngd(whole)
    assert [r.layer for r in opt.coverage()] == ["2"]
    train(opt, whole, [points(12, 0)])


def test_parametrised_weights_are_loose():
    model = mlp()
    parametrizations.weight_norm(model[0])
    opt = spngd(model)
    assert "computed" in row(opt, "0.bias").why
    assert {r.layer for r in opt.coverage() if r.why != "known layer"} >= {"0.bias"}
    before = [p.detach().clone() for p in model.parameters()]
    losses = train(opt, model, [points(12, 0)] * 15)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before))


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: torch.optim.swa_utils.AveragedModel(m).module,
    ],
    ids=["deepcopy", "pickle", "averaged"],
)
def test_copies_of_an_armed_model_are_not_watched(copied):
    model = mlp()
    opt = spngd(model)
    assert hooks(model)
    other = copied(model)
    backward(other, points(12, 9))
    assert opt.engine.capture.collect().samples == 0
    twin = clone(model)
    train(opt, model, [points(12, 0)])
    train(spngd(twin), twin, [points(12, 0)])  # a copy can have an optimizer of its own
    assert torch.equal(weights(model), weights(twin))
    quiet(backward, other, points(12, 9))


def test_loose_parameters_take_adams_direction_at_the_length_of_their_weight():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor([1.0, -2.0, 3.0, 0.5]))

        def forward(self, x):
            return x * self.gain

    model = Scaled()
    opt = natgrad.SPNGD(model, lr=0.1, momentum=0.8, weight_decay=0.0)
    first = second = torch.zeros(4)
    for k in range(1, 4):
        x, y = points(8, k)
        before = model.gain.detach().clone()
        F.cross_entropy(model(x), y).backward()
        g = model.gain.grad.clone()
        opt.step()
        opt.zero_grad()
        first, second = 0.8 * first + 0.2 * g, 0.99 * second + 0.01 * g**2
        direction = first / (1 - 0.8**k) / ((second / (1 - 0.99**k)).sqrt() + 1e-8)
        expected = -0.1 * before.norm() * direction / direction.norm()
        torch.testing.assert_close(model.gain.detach() - before, expected)
