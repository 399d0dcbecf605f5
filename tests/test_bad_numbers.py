"""Bad numbers as a law over all optimizers: nothing is silently wrong. benchmarks/bad_numbers.py makes the table."""

import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import natgrad
from helpers import OPTIMIZERS, backward, made, mlp, points, row, said_by, statistic, train, weights

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bad_numbers
from bad_numbers import CASES, DEGENERATE, RIGHT


def test_every_optimizer_is_in_the_table():
    kinds = {type(build(mlp())) for build in bad_numbers.OPTIMIZERS.values()}
    assert kinds == set(OPTIMIZERS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_goes_wrong_ends_as_it_should(case):
    for name in case.only:
        found = bad_numbers.outcome(case, name)
        assert found.good, (name, found)


@pytest.mark.parametrize("twist", DEGENERATE.values())
@pytest.mark.parametrize("name", ["SPNGD", "KFAC", "SENG", "NLCG"])
def test_degenerate_data_gives_the_steps_of_the_reference(name, twist):
    assert bad_numbers.compared(name, twist, ranks=2) == RIGHT
    if twist != "huge":
        assert bad_numbers.compared(name, twist, dtype="float32") == RIGHT


def test_a_batch_of_one_gives_the_steps_of_the_reference():
    assert all(bad_numbers.compared(name, "", samples=1) == RIGHT for name in ("SPNGD", "KFAC", "SENG", "NLCG"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-35, 1e-20, 1.0, 1e15])
def test_pi_stays_within_the_range_of_numbers(size, dtype):
    """However unlike the factors: far out both are nothing beside their damping, and the step is the gradient's."""
    traces = {"A": torch.ones(1, dtype=dtype), "G": torch.full((1,), size, dtype=dtype)}
    parts = natgrad.curvature.Kronecker().split(traces, 1e-2)
    for part in parts.values():
        assert 1e-30 < float(part) < 1e30
    assert_close(parts["A"] * parts["G"], torch.full((1,), 1e-2, dtype=dtype), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [natgrad.SPNGD, natgrad.KFAC])
def test_curvature_that_underflows_leaves_finite_weights(kind):
    """Gradients of 1e-22: their squares are denormal numbers in single precision, and A over G was infinite."""
    model = mlp()
    opt = kind(model, lr=0.1, refresh=1)
    for k in range(3):
        (1e-22 * backward_loss(model, k)).backward()
        opt.step()
        opt.zero_grad()
    assert bool(torch.isfinite(weights(model)).all())


def backward_loss(model, seed):
    x, y = points(16, seed)
    return torch.nn.functional.cross_entropy(model(x), y)


def test_a_statistic_that_is_no_number_any_more_is_measured_anew():
    """A running mean keeps what a bit that flips has made of it, and its inverse would fail for ever."""
    model = mlp()
    opt = natgrad.KFAC(model, lr=0.01, refresh=1, ema_decay=0.9, rows_per_dim=None)
    train(opt, model, [points(16, k) for k in range(3)])
    opt.state[model[0].weight]["A"].view(-1)[0] = float("nan")
    train(opt, model, [points(16, 3)])
    assert opt.engine.dropped > 0
    train(opt, model, [points(16, 4)])
    retries = opt.engine.retries
    x = torch.cat([points(16, 4)[0], torch.ones(16, 1)], 1)
    assert_close(statistic(opt, "0", "A")[0], x.T @ x / 16)
    train(opt, model, [points(16, 5)])
    assert opt.engine.retries == retries
    assert bool(torch.isfinite(weights(model)).all())


def test_a_parameter_without_curvature_recovers_from_a_gradient_whose_square_is_infinite():
    class Gain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.gain = torch.nn.Linear(4, 3), torch.nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.body(x) * self.gain

    model = Gain()
    opt = natgrad.SPNGD(model, lr=0.01, length=natgrad.plain)  # others hold back where gradients were so steep
    assert not row(opt, "gain").covered
    for k in range(40):
        backward(model, points(16, k))
        if k == 2:
            model.gain.grad.fill_(1e30)
        before = model.gain.detach().clone()
        opt.step()
        opt.zero_grad()
    assert opt.skipped == 0
    assert not torch.equal(model.gain, before)
    assert bool(torch.isfinite(weights(model)).all())


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_steps_that_are_skipped_one_after_the_other_are_said_once_with_the_reason(kind):
    model = mlp()
    opt = made(kind, model, lr=0.01)
    said = []
    for k in range(25):
        backward(model, points(8, k))
        if k == 5:
            opt.zero_grad()
            backward(model, points(8, k))
        else:
            model[2].weight.grad[0, 0] = float("nan")
        said += [(k, text) for text in said_by(opt.step) if "steps were skipped" in text]
        opt.zero_grad()
    ((when, text),) = said
    assert when == 15  # ten in a row
    assert "now those of 2.weight: look at the loss and the samples" in text
    assert opt.skipped == 24


def test_weights_that_are_not_finite_are_named():
    model = mlp()
    opt = natgrad.SPNGD(model, lr=0.01)
    with torch.no_grad():
        model[2].weight[0, 0] = float("inf")
    said = []
    for k in range(12):
        backward(model, points(8, k))
        said += said_by(opt.step)
        opt.zero_grad()
    assert [text for text in said if "2.weight: the weights are not finite" in text]


@pytest.mark.parametrize("kind", [natgrad.SPNGD, natgrad.KFAC, natgrad.SENG])
def test_layers_whose_factorisations_keep_failing_are_named_once(kind):
    model = mlp()
    opt = kind(model, lr=1e-3, refresh=1)
    said = []
    with bad_numbers.failing(10**9):
        for k in range(6):
            backward(model, points(16, k))
            said += [(k, text[:3]) for text in said_by(opt.step) if "could not be inverted" in text]
            opt.zero_grad()
    assert sorted(said) == [(2, "0: "), (2, "2: ")]
    assert opt.engine.mended == {"0": 6, "2": 6}


def test_steps_whose_bound_stays_at_its_floor_are_said_once():
    model = mlp()
    length = natgrad.MeasuredChange(first=1e9, least=1e-8, most=1e-8, memory=0.999)
    opt = natgrad.SPNGD(model, lr=0.1, length=length)
    said = []
    for k in range(120):
        backward(model, points(16, k))
        said += [(k, text) for text in said_by(opt.step) if "the least that is allowed" in text]
        opt.zero_grad()
    assert [k for k, _ in said] == [100]  # it is heard with the next step
