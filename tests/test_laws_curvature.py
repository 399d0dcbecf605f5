"""What must hold for every curvature: it solves its own damped system, and it is a mean over samples."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from helpers import CURVATURES, measured
from natgrad.capture import Sampler
from natgrad.curvature import SampleSpace
from natgrad.layers import layer_of
from natgrad.linalg import mean_eigenvalue

EVERYTHING = Sampler(0, 0, 0, 1.0).draw(0, 0, torch.device("cpu"))
DAMPINGS = (1e-3, 1e-1, 1e1)

LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (8, 4)),
    "places": (lambda: nn.Linear(4, 3, bias=False), (8, 5, 4)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (8, 4, 5, 5)),
    "norm": (lambda: nn.BatchNorm2d(3), (8, 3, 4, 4)),
    "scale only": (lambda: nn.RMSNorm(5, eps=1e-5), (8, 3, 5)),
    "embedding": (lambda: nn.Embedding(6, 4), None),
}


def variants(kind):
    """A curvature with every setting of its switches."""
    switches = [f.name for f in dataclasses.fields(kind) if f.init and isinstance(f.default, bool)]
    for values in itertools.product((False, True), repeat=len(switches)):
        yield kind(**dict(zip(switches, values)))


MOMENTS = [kind for kind in CURVATURES if kind is not SampleSpace]  # whose laws are in test_samplespace.py
KINDS = [c for kind in MOMENTS for c in variants(kind)]
IDS = [f"{c.name}{i}" for i, c in enumerate(KINDS)]
every_curvature = pytest.mark.parametrize("curvature", KINDS, ids=IDS)
every_layer = pytest.mark.parametrize("layer", LAYERS)


def example(name):
    build, shape = LAYERS[name]
    torch.manual_seed(3)
    module = build().double()
    x = torch.randint(6, (8, 5)) if shape is None else torch.randn(shape, dtype=torch.float64)
    out = module(x)
    return layer_of(module), x, out, torch.randn_like(out) / len(x)


def statistics(curvature, layer, x, out, dy, draw=EVERYTHING):
    """Means over samples, as the engine makes them of one backward pass of a mean loss."""
    n, _ = layer.count(x)
    result = {}
    for moment in curvature.statistics:
        with torch.no_grad():
            part = measured(moment, layer, x, dy, draw, out)
        result[moment.key] = part * (1 / n if moment.order == 0 else n)
    return result


def inverses(curvature, values, damping):
    """Inverses that serve this damping: of curvatures that damp later, made with another."""
    if curvature.damps_at_apply:
        damping *= 7
    parts = curvature.split({k: mean_eigenvalue(v) for k, v in values.items()}, damping)
    return {k: curvature.factor(k, v, parts[k])[0] for k, v in values.items()}


def test_curvatures_are_found():
    assert len(CURVATURES) >= 4
    for kind in CURVATURES:
        assert dataclasses.is_dataclass(kind)
        assert kind.__dataclass_params__.frozen, f"{kind.__name__} must have no state"
    assert len({kind().name for kind in CURVATURES}) == len(CURVATURES)


@every_layer
@every_curvature
def test_preconditioning_solves_the_dense_system(curvature, layer):
    layer, *seen = example(layer)
    values = statistics(curvature, layer, *seen)
    gradient = torch.randn(layer.shape, dtype=torch.float64)
    for damping in DAMPINGS:
        dense = curvature.dense(values, layer.shape, damping)
        assert dense.shape == (layer.shape.numel,) * 2
        assert torch.linalg.eigvalsh(dense).min() > 0
        solved = torch.linalg.solve(dense, gradient.flatten()).view(layer.shape)
        mine = curvature.precondition(inverses(curvature, values, damping), gradient, damping)
        assert_close(mine, solved, rtol=1e-9, atol=1e-9 * float(solved.abs().max()))


@every_layer
@every_curvature
def test_more_damping_gives_a_shorter_step(curvature, layer):
    layer, *seen = example(layer)
    values = statistics(curvature, layer, *seen)
    gradient = torch.randn(layer.shape, dtype=torch.float64)
    steps = [curvature.precondition(inverses(curvature, values, d), gradient, d) for d in DAMPINGS]
    lengths = [float(s.norm()) for s in steps]
    for longer, shorter in itertools.pairwise(lengths):
        assert shorter < longer or not values
    assert all(float((s * gradient).sum()) > 0 for s in steps)  # downhill
    assert not any(s is gradient for s in steps)


@every_layer
@every_curvature
def test_the_order_of_samples_does_not_matter(curvature, layer):
    layer, x, _, dy = example(layer)
    order = torch.randperm(len(x))
    once = statistics(curvature, layer, x, None, dy)
    again = statistics(curvature, layer, x[order], None, dy[order])
    for key in once:
        assert_close(once[key], again[key], rtol=1e-12, atol=1e-14)


@every_layer
@every_curvature
def test_statistics_have_the_shape_and_symmetry_that_they_say(curvature, layer):
    layer, *seen = example(layer)
    values = statistics(curvature, layer, *seen)
    assert len({m.key for m in curvature.statistics}) == len(curvature.statistics)
    for moment in curvature.statistics:
        value = values[moment.key]
        assert value.shape == moment.shape(layer)
        if value.dim() == 3:
            assert moment.symmetric
            assert_close(value, value.mT, rtol=1e-12, atol=1e-15)
            assert torch.linalg.eigvalsh(value).min() > -1e-12
        else:
            assert value.min() >= 0


@every_layer
@every_curvature
def test_a_bound_above_all_rows_measures_them_all(curvature, layer):
    """And the bounded path of every statistic runs: a bound of one."""
    layer, *seen = example(layer)
    exact = statistics(curvature, layer, *seen)
    bounded = statistics(dataclasses.replace(curvature, rows_per_dim=10_000), layer, *seen)
    few = statistics(dataclasses.replace(curvature, rows_per_dim=1), layer, *seen)
    for key in exact:
        assert_close(bounded[key], exact[key])
        assert few[key].shape == exact[key].shape
        assert bool(torch.isfinite(few[key]).all())


@every_curvature
def test_costs_grow_with_rows_and_sides(curvature):
    small, large = layer_of(nn.Linear(4, 3)), layer_of(nn.Linear(40, 30))
    for layer in (small, large):
        few, many = curvature.cost(layer, 10), curvature.cost(layer, 10_000)
        assert min(few.measure, *few.factors.values(), few.numbers) >= 0
        assert few.precondition > 0
        assert few.work == sum(few.factors.values()) + few.precondition > 0
        assert set(few.factors) == {m.key for m in curvature.statistics}
        assert few.measure < many.measure or not curvature.statistics
        assert few[1:] == many[1:]
        shapes = [m.shape(layer) for m in curvature.statistics]
        assert few.numbers == sum(torch.Size(s).numel() for s in shapes)
    less, more = curvature.cost(small, 100), curvature.cost(large, 100)
    assert less.measure <= more.measure
    assert less.precondition <= more.precondition
    assert all(less.factors[key] <= more.factors[key] for key in less.factors)
    bounded = dataclasses.replace(curvature, rows_per_dim=2)
    assert bounded.cost(large, 10**6).measure <= curvature.cost(large, 10**6).measure


@pytest.mark.parametrize("damping", DAMPINGS)
def test_the_closed_form_of_a_channel_is_the_papers(damping):
    """SP-NGD eq. 17: d_gamma = (d grad_gamma - b grad_beta) / det, d_beta = (a grad_beta - b grad_gamma) / det."""
    from natgrad.curvature import UnitWise

    u = torch.randn(50, 3, 2, dtype=torch.float64)
    f = torch.einsum("nci,ncj->cij", u, u) / 50
    gradient = torch.randn(3, 1, 2, dtype=torch.float64)
    a, b, d = f[:, 0, 0] + damping, f[:, 0, 1], f[:, 1, 1] + damping
    gamma, beta = gradient[:, 0].unbind(1)
    expected = torch.stack([d * gamma - b * beta, a * beta - b * gamma], 1) / (a * d - b * b)[:, None]
    mine = UnitWise().precondition(inverses(UnitWise(), {"F": f}, damping), gradient, damping)
    assert_close(mine[:, 0], expected, rtol=1e-10, atol=1e-12)


def test_one_over_hw_may_sit_on_either_factor():
    """Spec 3.2: with the trace-norm pi the damped inverse is the same."""
    from natgrad.curvature import Kronecker

    layer, *seen = example("groups")
    values = statistics(Kronecker(), layer, *seen)
    other = {"A": values["A"] * 9, "G": values["G"] / 9}
    gradient = torch.randn(layer.shape, dtype=torch.float64)
    steps = [Kronecker().precondition(inverses(Kronecker(), v, 0.03), gradient, 0.03) for v in (values, other)]
    assert_close(*steps, rtol=1e-12, atol=1e-14)
