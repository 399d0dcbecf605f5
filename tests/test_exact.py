"""One step of every layer against a dense computation of our own: no rows, factors or inverses of natgrad's.

A model is one layer and a fixed nonlinear head without parameters, in float64, every row measured. With lr=1 and no
momentum a step is minus the damped natural gradient. Per-sample gradients of the output come from autograd (the loss
is a mean, so n times the batch's), patches from F.unfold.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import natgrad

DAMPING = 0.02
EXACT = {"rtol": 1e-8, "atol": 1e-10}


class Headed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        self.output = self.layer(x)
        self.output.retain_grad()
        flat = self.output.flatten(1)
        weight = torch.linspace(-2, 2, flat.shape[1]).sin()
        return (torch.tanh(flat) @ weight - 0.3).square().mean() + (flat**4).sum(1).mean() / 50


def step(layer, x, optimizer=natgrad.SPNGD, **options):
    """(change of each parameter, its gradient, per-sample gradients of the output)."""
    model = Headed(layer)
    start = [p.detach().clone() for p in layer.parameters()]
    options = {
        "lr": 1.0,
        "momentum": 0.0,
        "damping": DAMPING,
        "rows_per_dim": None,
        "ema_decay": 0.0,
        "length": natgrad.plain,
        "predictions": 1,  # the head mixes the places of a sample
        **options,
    }
    opt = optimizer(model, **options)
    model(x).backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    g = model.output.grad * len(x)
    opt.step()
    return [p.detach() - s for p, s in zip(layer.parameters(), start)], gradients, g


def kronecker_solve(a, g, gradient):
    """(G + sqrt(l)/pi I) (x) (A + pi sqrt(l) I) solved densely for a gradient [o, i] (SP-NGD eq. 12)."""
    pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
    a = a + pi * DAMPING**0.5 * torch.eye(len(a))
    g = g + DAMPING**0.5 / pi * torch.eye(len(g))
    return torch.linalg.solve(torch.kron(g, a), gradient.flatten()).view(gradient.shape)


def check(changes, gradients, weights_as, rows, outputs):
    """Rows [n, s, i] and output gradients [n, s, o] of one block against a step."""
    a = torch.einsum("nsi,nsj->ij", rows, rows) / rows.shape[:2].numel()
    g = torch.einsum("nso,nsp->op", outputs, outputs) / len(outputs)
    expected = -kronecker_solve(a, g, weights_as(gradients))
    assert_close(weights_as(changes), expected, **EXACT)


def with_ones(rows):
    return torch.cat([rows, torch.ones(*rows.shape[:-1], 1)], -1)


def columns(tensors):
    """Weight (and bias) as one matrix."""
    return torch.cat([t.flatten(1) if t.dim() > 1 else t[:, None] for t in tensors], 1)


@pytest.mark.parametrize("optimizer", [natgrad.SPNGD, natgrad.KFAC])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(9, 4), (7, 5, 4)])
def test_linear(double, shape, bias, optimizer):
    x = torch.randn(shape)
    changes, gradients, g = step(nn.Linear(4, 3, bias=bias), x, optimizer)
    rows = x.reshape(len(x), -1, 4)
    check(changes, gradients, columns, with_ones(rows) if bias else rows, g.reshape(len(x), -1, 3))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": (2, 1), "bias": False},
        {"dilation": 2, "padding": 2},
        {"groups": 2, "padding": 1},
        {"groups": 8, "stride": 2, "bias": False},
    ],
    ids=str,
)
def test_conv2d(double, options):
    c, o, groups = 8, 8, options.get("groups", 1)
    layer = nn.Conv2d(c, o, 3, **options)
    x = torch.randn(5, c, 7, 6)
    changes, gradients, g = step(layer, x)
    geometry = {"dilation": layer.dilation, "padding": layer.padding, "stride": layer.stride}
    for k in range(groups):
        ins, outs = slice(k * c // groups, (k + 1) * c // groups), slice(k * o // groups, (k + 1) * o // groups)
        rows = F.unfold(x[:, ins], 3, **geometry).transpose(1, 2)
        outputs = g[:, outs].flatten(2).transpose(1, 2)
        check(
            changes,
            gradients,
            lambda tensors, outs=outs: columns([t[outs] for t in tensors]),
            with_ones(rows) if layer.bias is not None else rows,
            outputs,
        )


def test_conv1d_circular(double):
    layer = nn.Conv1d(3, 4, 3, stride=2, padding=1, padding_mode="circular")
    x = torch.randn(6, 3, 8)
    changes, gradients, g = step(layer, x)
    wrapped = torch.cat([x[..., -1:], x, x[..., :1]], -1)
    rows = wrapped.unfold(2, 3, 2).permute(0, 2, 1, 3).flatten(2)
    check(changes, gradients, columns, with_ones(rows), g.transpose(1, 2))


def test_embedding(double):
    x = torch.randint(6, (8, 5))
    changes, gradients, g = step(nn.Embedding(7, 3), x)
    check(changes, gradients, lambda t: t[0].T, F.one_hot(x, 7).double(), g)


def unit_steps(normal, g, gradients, places):
    """SP-NGD section 4.2: 2x2 blocks over per-sample (scale, shift) gradients. `normal`, `g`: [n, c, ...]."""
    u = torch.stack([(g * normal).sum(places), g.sum(places)], -1)  # [n, c, 2]
    block = torch.einsum("nci,ncj->cij", u, u) / len(u) + DAMPING * torch.eye(2)
    return -torch.linalg.solve(block, torch.stack(gradients, -1))


@pytest.mark.parametrize("mode", [True, False])
def test_batch_norm(double, mode):
    layer = nn.BatchNorm2d(4).train(mode)
    layer.running_var.uniform_(0.5, 2)
    nn.init.normal_(layer.weight)
    x = torch.randn(6, 4, 3, 3) * 2 + 1
    plain = F.batch_norm(x, layer.running_mean.clone(), layer.running_var.clone(), training=mode)
    changes, gradients, g = step(layer, x)
    assert_close(torch.stack(changes, -1), unit_steps(plain, g, gradients, (2, 3)), **EXACT)


def test_batch_norm_of_inputs_far_from_zero():
    """Single precision, a mean of 1,000 deviations."""
    x = torch.randn(16, 4, 3, 3, dtype=torch.float64) + 1000
    steps = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        layer = nn.BatchNorm2d(4).to(dtype)
        torch.set_default_dtype(dtype)
        steps.append(torch.stack(step(layer, x.to(dtype))[0]).double())
        torch.set_default_dtype(torch.float32)
    assert_close(steps[1], steps[0], rtol=0.02, atol=1e-3)


def test_group_norm(double):
    x = torch.randn(6, 4, 3, 3) * 2 + 1
    changes, gradients, g = step(nn.GroupNorm(2, 4), x)
    assert_close(torch.stack(changes, -1), unit_steps(F.group_norm(x, 2), g, gradients, (2, 3)), **EXACT)


def test_layer_norm(double):
    x = torch.randn(6, 3, 5) * 2 + 1
    changes, gradients, g = step(nn.LayerNorm(5), x)
    assert_close(torch.stack(changes, -1), unit_steps(F.layer_norm(x, (5,)), g, gradients, 1), **EXACT)


def test_unitwise_of_a_linear_layer(double):
    """Per-sample gradients by a loop, one dense solve."""
    x = torch.randn(6, 5, 4)
    layer = nn.Linear(4, 3)
    changes, gradients, g = step(
        layer, x, curvature=lambda layer, rows_per_dim, size: natgrad.curvature.UnitWise(rows_per_dim)
    )
    rows = with_ones(x)
    samples = torch.stack([sum(torch.outer(g[n, s], rows[n, s]) for s in range(5)) for n in range(6)])
    for unit in range(3):
        f = samples[:, unit].T @ samples[:, unit] / 6
        expected = -torch.linalg.solve(f + DAMPING * torch.eye(5), columns(gradients)[unit])
        assert_close(columns(changes)[unit], expected, **EXACT)


@pytest.mark.parametrize("size", [4, 2])
def test_sides_above_max_size_stay_diagonal(double, size):
    x = torch.randn(9, 4)
    changes, gradients, g = step(nn.Linear(4, 3, bias=False), x, max_size=size)
    a, c = x.T @ x / 9, g.T @ g / 9
    if size < 4:
        a = torch.diag(a.diagonal())
    if size < 3:
        c = torch.diag(c.diagonal())
    assert_close(changes[0], -kronecker_solve(a, c, gradients[0]), **EXACT)


def test_layers_of_a_deep_model_take_their_own_steps(double):
    """Two linear layers at once, outputs' gradients by autograd with respect to the hidden values."""
    first, second = nn.Linear(4, 5), nn.Linear(5, 3)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    hidden = first(x)
    out = second(torch.tanh(hidden))
    loss = F.cross_entropy(out, y)
    dh, do = torch.autograd.grad(loss, (hidden, out), retain_graph=True)
    rows = (with_ones(x), with_ones(torch.tanh(hidden)).detach())
    model = nn.Sequential(first, nn.Tanh(), second)
    start = [[p.detach().clone() for p in layer.parameters()] for layer in (first, second)]
    opt = natgrad.SPNGD(model, lr=1.0, momentum=0.0, damping=DAMPING, rows_per_dim=None, length=natgrad.plain)
    F.cross_entropy(model(x), y).backward()
    gradients = [[p.grad.clone() for p in layer.parameters()] for layer in (first, second)]
    opt.step()
    for k, (layer, g) in enumerate(((first, dh), (second, do))):
        changes = [p.detach() - s for p, s in zip(layer.parameters(), start[k])]
        check(changes, gradients[k], columns, rows[k].unsqueeze(1), (g * 8).unsqueeze(1))
