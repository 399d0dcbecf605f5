"""SENG on layers of every kind, however they are called: always the dense direction, or by name without curvature."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import natgrad
from helpers import backward, clone, hooks, mlp, points, quiet, train, weights

DAMPING = 0.2

GEOMETRIES = {
    "plain": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 6)),
    "stride": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 7, 6)),
    "dilation": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2), (4, 7, 6)),
    "same": (lambda: nn.Conv2d(4, 6, (2, 4), padding="same"), (4, 7, 6)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False), (4, 7, 6)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 7, 6)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 7, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (4, 7, 6)),
    "1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 9)),
    "3d": (lambda: nn.Conv3d(4, 5, 2), (4, 3, 4, 3)),
    "few places": (lambda: nn.Conv2d(20, 30, 3), (20, 3, 4)),
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "places": (lambda: nn.Linear(5, 3), (4, 5)),
    "layer norm": (lambda: nn.LayerNorm(5), (4, 5)),
    "rms norm": (lambda: nn.RMSNorm(5), (4, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 5, 3)),
    "batch norm in eval": (lambda: nn.BatchNorm2d(4).eval(), (4, 5, 3)),
}


class Headed(nn.Module):
    """A layer and a fixed nonlinear head; an in-place activation follows the layer if asked for."""

    def __init__(self, layer, wrap=lambda f, x: f(x), in_place=False):
        super().__init__()
        self.layer, self.wrap, self.in_place = layer, wrap, in_place

    def forward(self, x):
        out = self.wrap(self.layer, x)
        out = (F.relu_(out) if self.in_place else torch.tanh(out)).flatten(1)
        return out @ torch.linspace(-2, 2, out.shape[1]).sin() / out.shape[1]


def loss_of(outputs):
    return (outputs - 0.3).square()


def seng(model, **options):
    settings = {"lr": 1.0, "momentum": 0.0, "damping": DAMPING, "samples": None, "sketch": None, "refresh": 1}
    return natgrad.SENG(model, length=natgrad.plain, **{**settings, **options})


def check(model, x, **options):
    """One step against -(lambda I + U U^T)^-1 g with per-sample gradients by autograd."""
    reference = copy.deepcopy(model)
    reference.wrap = lambda f, x: f(x)
    parameters = {k: v.detach() for k, v in reference.named_parameters()}

    def loss(p, a):
        return loss_of(functional_call(reference, p, (a[None],))).sum()

    columns = vmap(grad(loss), (None, 0))(parameters, x)
    u = torch.cat([c.flatten(1) for c in columns.values()], 1)
    expected = torch.linalg.solve(u.T @ u / len(u) + DAMPING * torch.eye(u.shape[1]), u.mean(0))
    start = weights(model)
    opt = seng(model, **options)
    loss_of(model(x)).mean().backward()
    opt.step()
    assert_close(start - weights(model), expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_layer_takes_the_dense_step(geometry, double):
    torch.manual_seed(0)
    build, shape = GEOMETRIES[geometry]
    check(Headed(build().double()), torch.randn(6, *shape))


def test_a_short_batch_and_a_single_sample(double):
    for n in (1, 2, 13):
        check(Headed(nn.Conv2d(3, 4, 2)), torch.randn(n, 3, 4, 4))


def test_an_in_place_activation_behind_a_layer(double):
    check(Headed(nn.Conv2d(3, 8, 3), in_place=True), torch.randn(5, 3, 5, 5))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, double):
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    check(Headed(layer, lambda f, x: checkpoint(f, x.requires_grad_(), use_reentrant=reentrant)), torch.randn(6, 4, 5))


def test_channels_last(double):
    check(Headed(nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)), torch.randn(6, 4, 5, 5))


def test_a_layer_called_twice_on_unlike_numbers_of_places(double):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv1d(2, 2, 3)

        def forward(self, x):
            return self.inner(torch.tanh(self.inner(x)))

    check(Headed(Twice()), torch.randn(5, 2, 9))


def test_attention_frozen_and_unused_layers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.frozen, self.unused, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.frozen.requires_grad_(False)

        def forward(self, x):
            x = self.frozen(self.attention(x, x, x)[0])
            return self.head(x.mean(1))

    torch.manual_seed(0)
    model, (x, y) = Model(), (torch.randn(16, 5, 8), torch.randint(3, (16,)))
    opt = natgrad.SENG(model, lr=0.3, damping=0.3, refresh=3)
    frozen, unused = model.frozen.weight.clone(), model.unused.weight.clone()
    losses = train(opt, model, [(x, y)] * 20)
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(model.frozen.weight, frozen)
    assert torch.equal(model.unused.weight, unused)
    rows = {row.layer: row for row in opt.coverage()}
    assert rows["head"].curvature == "per-sample"
    assert {rows[f"attention.{name}"].curvature for name in ("in_proj", "out_proj")} == {"per-sample"}


def test_a_weight_that_is_changed_before_its_use_becomes_loose():
    class Behind(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return F.linear(torch.tanh(self.body(x)), torch.tanh(self.head.weight), self.head.bias)

    model = Behind()
    opt = seng(model, lr=0.1)
    quiet(train, opt, model, [points(12, k) for k in range(3)])
    assert {row.layer: row.curvature for row in opt.coverage()}["head.weight"] == "none (adam)"


def test_copies_are_not_watched_and_hooks_go_when_nothing_is_due():
    model = mlp()
    opt = seng(model, refresh=3, columns="improved", lr=0.1)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        backward(copied, points(8, 0))
    train(opt, model, [points(8, 0)])
    assert hooks(model) == 0
    train(opt, model, [points(8, 0)] * 2)
    assert hooks(model) > 0


def test_bf16_autocast_and_half_models():
    for dtype in (None, torch.bfloat16):
        model = mlp() if dtype is None else mlp().to(dtype)
        opt = natgrad.SENG(model, lr=0.3, damping=0.3, refresh=2)
        losses = []
        for _ in range(15):
            x, y = points(16, 0, dtype or torch.float32)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
                loss = F.cross_entropy(model(x).float(), y)
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        assert all(v.dtype == torch.float32 for s in opt.state.values() for k, v in s.items() if k == "U_columns")


def test_a_compiled_model_measures_the_same():
    model = mlp()
    other = clone(model)
    compiled = torch.compile(other, backend="eager")
    train(seng(model, lr=0.1, refresh=2, columns="improved"), model, [points(12, k) for k in range(3)])
    train(seng(compiled, lr=0.1, refresh=2, columns="improved"), compiled, [points(12, k) for k in range(3)])
    assert_close(weights(other), weights(model), rtol=1e-5, atol=1e-6)


def test_a_batch_that_is_not_finite_leaves_nothing():
    model = mlp()
    opt = seng(model, lr=0.1)
    x, y = points(8, 0)
    start = weights(model)
    backward(model, (x * float("inf"), y))
    opt.step()
    opt.zero_grad()
    assert opt.skipped == 1
    assert torch.equal(weights(model), start)
    train(opt, model, [points(8, 1)])
    assert bool(torch.isfinite(weights(model)).all())
