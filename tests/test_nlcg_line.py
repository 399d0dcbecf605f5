"""The curvature step's extra forward passes, and what NLCG refuses."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import natgrad
from helpers import backward, mlp, points, weights
from natgrad.curvature import SampleSpace
from natgrad.optim.seng import SampleBlocks
from nlcg_choices import QUIET, SAMPLED, nlcg


class Restless(nn.Module):
    """Running statistics and dropout."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, x):
        return self.body(x)


def test_extra_forward_passes_leave_no_trace():
    model, (x, y) = Restless(), points(32, 0)
    opt = natgrad.NLCG(model, step=natgrad.CurvatureStep())
    F.cross_entropy(model(x), y).backward()
    buffers, random, drawn, entered = [b.clone() for b in model.buffers()], torch.get_rng_state(), [], []

    def forward():
        entered.append(weights(model))
        drawn.append(torch.get_rng_state())
        return model(x)

    before = weights(model)
    opt.step(forward=forward)
    assert all(torch.equal(b, c) for b, c in zip(model.buffers(), buffers))
    assert torch.equal(torch.get_rng_state(), random)
    assert len(drawn) == 2
    assert torch.equal(drawn[0], random)
    assert torch.equal(*drawn)  # the same units are dropped twice
    e = entered[0] - before
    assert_close(entered[1] - before, -e, rtol=1e-2, atol=1e-6)
    assert e.norm().item() == pytest.approx(1e-3 * before.norm().item(), rel=1e-3)


def test_a_forward_pass_that_fails_puts_everything_back():
    model, (x, y) = Restless(), points(32, 0)
    opt = natgrad.NLCG(model, step=natgrad.CurvatureStep())
    F.cross_entropy(model(x), y).backward()
    before = weights(model)
    with pytest.raises(ValueError, match="outside of autocast"):
        opt.step(forward=lambda: model(x).bfloat16())
    assert torch.equal(weights(model), before)
    assert opt.memory.steps == 0


def test_a_curvature_step_that_cannot_see_stands_still():
    """Outputs that overflow say nothing of how far to go."""
    model, (x, y) = mlp(), points(8, 0)
    opt = natgrad.NLCG(model, step=natgrad.CurvatureStep())
    before = weights(model)
    backward(model, (x, y))
    opt.step(forward=lambda: model(x) * float("inf"))
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("change", [1e-4, None])
def test_outputs_change_by_so_much_at_most(change, reduction):
    """The model's own t^2 d.G d, found here by differentiation, is what `change` bounds."""
    model, (x, y) = mlp().double(), points(64, 0, torch.float64)
    search = natgrad.CurvatureStep(mu=0.0, change=change)
    opt = natgrad.NLCG(model, lr=1.0, preconditioner=None, step=search, reduction=reduction)
    names = [name for name, _ in model.named_parameters()]
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    backward(model, (x, y), reduction=reduction)
    opt.step(forward=lambda: model(x))
    moved = {name: p.detach() - start[name] for name, p in model.named_parameters()}
    logits, tangent = torch.func.jvp(
        lambda *w: torch.func.functional_call(model, dict(zip(names, w)), (x,)),
        tuple(start.values()),
        tuple(moved[name] for name in names),
    )
    p = logits.softmax(1)
    found = float(((p * tangent.square()).sum(1) - (p * tangent).sum(1).square()).mean())
    if change is None:
        assert found > 1e-3
    else:
        assert found == pytest.approx(change, rel=1e-3)


def test_squared_errors_have_no_such_bound():
    search = natgrad.CurvatureStep(output="squared", change=1e-6)
    assert search.longest(1.0) == search.limit
    assert natgrad.CurvatureStep(change=0.04).longest(4.0) == pytest.approx(0.1)
    assert natgrad.CurvatureStep().longest(0.0) == search.limit
    with pytest.raises(ValueError, match="change=0"):
        natgrad.CurvatureStep(change=0.0)


def test_half_precision_weights_have_no_curvature_step():
    model = mlp().bfloat16()
    opt = natgrad.NLCG(model, step=natgrad.CurvatureStep())
    x, y = points(8, 0, torch.bfloat16)
    backward(model, (x, y))
    with pytest.raises(ValueError, match=r"bfloat16 cannot hold.*Scheduled"):
        opt.step(forward=lambda: model(x))


IMPROVED = SampleBlocks(SampleSpace(samples=8, columns="improved"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"momentum": 0.9}, r"'momentum': beta"),
        ({"fallback": natgrad.optim.adam}, r"'fallback'.*inner products"),
        ({"length": natgrad.trust}, r"'length'.*step="),
        ({"curvature": natgrad.spngd_blocks}, r"'curvature'.*preconditioner=spngd_blocks"),
    ],
)
def test_arguments_of_the_others_say_what_takes_their_place(options, says):
    with pytest.raises(TypeError, match=r"^NLCG\(\) has no argument " + says):
        nlcg(mlp(), **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"damping": 0.1}, r"damping=0.1.*diagonal BFGS"),
        ({"rows_per_dim": None, "preconditioner": None}, r"rows_per_dim=None.*identity"),
        ({"seed": 1}, r"seed=1"),
        ({"preconditioner": "bfgs"}, r"preconditioner='bfgs'"),
        ({"preconditioner": SAMPLED, "rows_per_dim": 8}, r"rows_per_dim=8 says nothing.*SampleSpace\(samples="),
        ({"preconditioner": IMPROVED}, r"columns=\"empirical\""),
        ({"mode": "exact"}, r"mode='exact'.*'hardened'"),
        ({"mode": "faithful", "preconditioner": natgrad.SecondMoment()}, "faithful"),
        ({"mode": "faithful", "beta": natgrad.optim.dai_yuan}, "faithful"),
        ({"mode": "faithful", "step": natgrad.CurvatureStep(), "lr": 1.0}, "faithful"),
        ({"mode": "faithful", "beta_max": 0.9}, "faithful"),
        ({"beta": 0.9}, "beta=0.9"),
        ({"beta_max": -1.0}, "beta_max=-1"),
        ({"step": "step"}, r"step='step'.*Scheduled"),
        ({"prescale": 0.0}, "prescale=0"),
        ({"lr": 2.0, "step": natgrad.CurvatureStep()}, r"lr=\[2.0\].*up to 1"),
        ({"weight_decay": -1.0}, "weight_decay=-1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options, says):
    with pytest.raises(ValueError, match=says) as refused:
        nlcg(mlp(), **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: natgrad.Scheduled("always"), "feedback='always'"),
        (lambda: natgrad.Scheduled(None, period=3), "period=3"),
        (lambda: natgrad.Scheduled("online", period=3), "period=3"),
        (lambda: natgrad.Scheduled(None, tau=2.0), "tau=2"),
        (lambda: natgrad.Scheduled(period=0), "period=0"),
        (lambda: natgrad.CurvatureStep("hinge"), "output='hinge'"),
        (lambda: natgrad.CurvatureStep(mu=-1.0), "mu=-1"),
        (lambda: natgrad.DiagonalBFGS(floor=-1.0), "floor=-1"),
        (lambda: natgrad.SecondMoment(decay=1.0), "decay=1"),
    ],
)
def test_parts_that_cannot_be_are_refused(make, says):
    with pytest.raises(ValueError, match=says) as refused:
        make()
    assert "\n" not in str(refused.value)


def test_steps_that_lack_something_or_have_too_much():
    model = mlp()
    backward(model, points(8, 0))
    line, opt, quiet = natgrad.NLCG(model, step=natgrad.CurvatureStep()), nlcg(model), nlcg(model, step=QUIET)
    for call, says in (
        (lambda: line.step(), r"step\(forward=lambda: model\(x\)\)"),
        (lambda: line.step(loss=1.0, forward=model), "does not listen"),
        (lambda: opt.step(forward=model), "takes no more forward passes"),
        (lambda: opt.step(lambda: torch.ones(()), loss=1.0), "leave one of them out"),
        (lambda: quiet.report(1.0), "does not listen"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    for length in (natgrad.plain, natgrad.optim.kl_clip):
        with pytest.raises(ValueError, match="does not listen"):
            natgrad.SPNGD(mlp(), lr=0.1, length=length).step(loss=1.0)


def test_groups_say_only_what_is_heard():
    for group, says in (({"momentum": 0.9}, "momentum=0.9"), ({"damping": 0.1}, "damping or refresh")):
        model = mlp()
        with pytest.raises(ValueError, match=says):
            nlcg(model, params=[{"params": list(model.parameters()), **group}])
    model = mlp()
    line = natgrad.NLCG(model, step=natgrad.CurvatureStep(), params=[{"params": [p]} for p in model.parameters()])
    line.param_groups[0]["lr"] = 0.5
    with pytest.raises(ValueError, match="one factor up to 1"):
        line.step(forward=lambda: model(points(8, 0)[0]))


def test_coverage_names_the_metric_and_its_bytes():
    model = mlp()
    for options, name, vectors in (
        ({}, "diagonal BFGS", 3),
        ({"preconditioner": None}, "identity", 1),
        ({"preconditioner": None, "beta": natgrad.optim.polak_ribiere}, "identity", 2),
        ({"preconditioner": natgrad.SecondMoment()}, "second moment", 2),
    ):
        opt = nlcg(model, **options)
        for row, cell in zip(opt.coverage(), opt.cells):
            kept = [v for k, v in cell.state().items() if k.startswith("nlcg_")]
            assert len(kept) == vectors
            assert row.curvature == name
            assert row.bytes == sum(v.numel() * v.element_size() for v in kept) == 4 * vectors * row.parameters
