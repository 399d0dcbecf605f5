"""K-FAC's factors and damped inverse against curvlinops (which is tested against the literature on its own).

Scales: curvlinops' "expand" setting with the empirical Fisher has A = mean over samples and places of a a^T and
G = mean over samples of the sum over places of g g^T, the same as ours (1/places on A, SP-NGD eq. 11), with weight
and bias in one matrix. Its `use_heuristic_damping` is eq. 12. Columns of a convolution are ordered (channel, tap)
there and (tap, channel) here, so parameters are compared, not matrices.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import natgrad

curvlinops = pytest.importorskip("curvlinops")


def networks():
    conv = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 3, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 4),
    )
    dense = nn.Sequential(nn.Flatten(), nn.Linear(72, 5, bias=False), nn.Tanh(), nn.Linear(5, 4))
    return {"conv": conv, "dense": dense}


@pytest.fixture(params=["conv", "dense"])
def problem(request, double):
    model = networks()[request.param]
    return model, torch.randn(7, 2, 6, 6), torch.randint(4, (7,))


def reference(model, x, y):
    return curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(x, y)],
        fisher_type="empirical",
        separate_weight_and_bias=False,
        check_deterministic=False,
    )


@pytest.mark.parametrize("optimizer", [natgrad.SPNGD, natgrad.KFAC])
def test_a_step_is_the_pi_damped_inverse_times_the_gradient(problem, optimizer):
    model, x, y = problem
    inverse = curvlinops.KFACInverseLinearOperator(reference(model, x, y), damping=0.03, use_heuristic_damping=True)
    start = [p.detach().clone() for p in model.parameters()]
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    expected = inverse @ list(gradients)
    opt = optimizer(model, lr=1.0, momentum=0.0, damping=0.03, rows_per_dim=None, length=natgrad.plain)
    F.cross_entropy(model(x), y).backward()
    opt.step()
    for p, s, e in zip(model.parameters(), start, expected):
        assert_close(s - p.detach(), e, rtol=1e-8, atol=1e-10)


def test_factors_are_the_same(problem):
    model, x, y = problem
    theirs = reference(model, x, y)
    theirs.compute_kronecker_factors()
    opt = natgrad.SPNGD(model, lr=1.0, rows_per_dim=None)
    F.cross_entropy(model(x), y).backward()
    opt.step()
    for cell in opt.cells:
        state, module = cell.state(), cell.layer.module
        a = theirs._input_covariances[cell.name]
        if isinstance(module, nn.Conv2d):  # to (tap, channel)
            order = torch.arange(module.weight[0].numel()).view(module.weight.shape[1:]).permute(1, 2, 0).flatten()
            order = torch.cat([order, torch.tensor([len(order)])])
            a = a[order][:, order]
        assert_close(state["A"][0], a, rtol=1e-9, atol=1e-12)
        assert_close(state["G"][0], theirs._gradient_covariances[cell.name], rtol=1e-9, atol=1e-14)
