"""The user's context, whatever it is: measuring and steps are in the precision of the tensors and on plain tensors."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import natgrad
from helpers import OPTIMIZERS, backward, clone, made, mlp, points, train, unwarned, weights

every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def wide():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))


@every_optimizer
def test_every_layer_trains_in_float16_at_a_large_batch(kind):
    """4,096 samples away from zero: sums of products that float16 cannot hold. Nothing is dropped, nothing skipped."""
    torch.manual_seed(0)
    x, y = torch.randn(4096, 64) * 2 + 3, torch.randint(3, (4096,))
    model = wide()
    opt = kind(model, lr=0.01, **({"step": natgrad.Scheduled(feedback=None)} if kind is natgrad.NLCG else {}))
    start = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with unwarned():
        for _ in range(4):
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
    assert (opt.skipped, opt.engine.dropped) == (0, 0)
    assert all(not torch.equal(p, s) for p, s in zip(model.parameters(), start))


@halves
def test_factors_under_autocast_are_those_of_double_precision(dtype):
    """A of what the layers saw, to single precision: products under autocast would be rounded, and overflow."""
    torch.manual_seed(0)
    model, seen = wide(), {}
    opt = natgrad.SPNGD(model, lr=1e-6, rows_per_dim=None)
    for name, module in model.named_children():
        module.register_forward_hook(lambda m, a, out, name=name: seen.update({name: a[0].detach().double()}))
    with torch.autocast("cpu", dtype):
        loss = F.cross_entropy(model(torch.randn(512, 64) + 3), torch.randint(3, (512,)))
        loss.backward()  # some leave this inside, too
    opt.step()
    for cell in opt.cells:
        a = torch.cat([seen[cell.name], torch.ones(512, 1, dtype=torch.float64)], 1)
        assert_close(cell.state()["A"][0].double(), a.T @ a / 512, rtol=1e-5, atol=1e-5)


@halves
@every_optimizer
def test_a_step_inside_of_autocast_is_the_step_outside(kind, dtype):
    ends = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = mlp()
        opt = made(kind, model, lr=0.05, refresh=1)
        for k in range(3):
            x, y = points(64, k)
            with torch.autocast("cpu", dtype):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            with torch.autocast("cpu", dtype, enabled=inside):
                opt.step()
                opt.zero_grad()
        ends.append(weights(model))
    assert torch.equal(*ends)


@every_optimizer
def test_a_closure_runs_in_the_context_of_its_caller(kind):
    model = mlp()
    opt = made(kind, model, lr=0.05)
    x, y = points(64, 0)
    seen = []

    def closure():
        opt.zero_grad()
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert opt.step(closure) is not None
    assert seen == [(True, True)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode], ids=lambda m: m.__name__)
@every_optimizer
def test_a_step_under_any_grad_mode(kind, mode):
    """Built and stepped inside, trained on outside, and nothing is left that autograd may not use."""
    ends = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = mlp()
        if inside:
            with mode():
                opt = made(kind, model, lr=0.05, refresh=2)
        else:
            opt = made(kind, model, lr=0.05, refresh=2)
        for k in range(4):
            backward(model, points(32, k))
            if inside:
                with mode():
                    opt.step()
            else:
                opt.step()
            opt.zero_grad()
            with torch.inference_mode():
                model(points(8, k)[0])
        ends.append(weights(model))
        tensors = [v for s in opt.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        assert not any(t.is_inference() or t.requires_grad for t in tensors)
    assert torch.equal(*ends)


def transform(model, x):
    params = {n: p.detach() for n, p in model.named_parameters()}

    def call(p, v):
        return torch.func.functional_call(model, p, (v,))

    torch.func.vmap(lambda v: call(params, v))(x)
    torch.func.grad(lambda p: call(p, x).sum())(params)
    torch.func.vmap(torch.func.grad(lambda p, v: call(p, v).sum()), (None, 0))(params, x)
    torch.func.jacrev(lambda v: call(params, v).sum(0))(x)
    torch.func.jvp(lambda v: call(params, v), (x,), (torch.ones_like(x),))


@every_optimizer
def test_transforms_of_functions_see_no_hooks(kind):
    """vmap, grad, jvp and jacrev through a watched model between forward and backward change nothing."""
    ends = []
    for disturbed in (False, True):
        torch.manual_seed(0)
        model = mlp()
        opt = made(kind, model, lr=0.05, refresh=1)
        for k in range(3):
            x, y = points(16, k)
            out = model(x)
            if disturbed:
                transform(model, x)
            F.cross_entropy(out, y).backward()
            opt.step()
            opt.zero_grad()
            assert opt.engine.samples == 16
        ends.append(weights(model))
    assert torch.equal(*ends)


def test_a_layer_that_is_called_inside_of_a_transform_alone_says_so():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(torch.tanh(torch.func.vmap(self.body)(x)))

    model = Mapped()
    opt = natgrad.SPNGD(model, lr=0.05)
    with pytest.warns(natgrad.NatgradWarning, match="body: "):
        train(opt, model, [points(12, 0)])
    assert not any(row.covered for row in opt.coverage() if row.layer.startswith("body"))


@every_optimizer
def test_evaluation_in_any_mode_between_passes_changes_nothing(kind):
    """An average of the weights, with a model of its own, and evaluations with and without gradients."""
    ends = []
    for busy in (False, True):
        torch.manual_seed(0)
        model = mlp()
        opt = made(kind, model, lr=0.05, rows_per_dim=2, refresh=1)
        average = torch.optim.swa_utils.AveragedModel(model) if busy else None
        for k in range(4):
            if busy:
                model(points(50, 9)[0])  # a graph that nobody uses
                with torch.no_grad():
                    model(points(50, 9)[0])
                clone(model)(points(5, 9)[0]).sum().backward()
            train(opt, model, [points(200, k)])
            if average is not None:
                average.update_parameters(model)
                average(points(50, 9)[0])
        ends.append(weights(model))
    assert torch.equal(*ends)
