"""Rows in all their forms, sketches, and the curvature that they make: against themselves written out."""

import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from natgrad.capture import Sampler
from natgrad.curvature import CountSketch, Legacy, SampleSpace, Sketch, Uniform, per_sample
from natgrad.curvature.per_sample import combine, conform, explicit, gram, numbers, project, stacked, thinned
from natgrad.layers import layer_of
from natgrad.layers.layer import Shape

SHAPE = Shape(2, 3, 4)
SKETCHES = [CountSketch, Uniform]


def factors(n=5, places=3, shape=SHAPE):
    return {
        "left": torch.randn(n, places, shape.blocks, shape.out).double(),
        "right": torch.randn(n, places, shape.blocks, shape.inner).double(),
    }


def tokens(n=5, places=3):
    shape = Shape(1, 3, 7)
    return {
        "left": torch.randn(n, places, 1, shape.out).double(),
        "tokens": torch.randint(-1, shape.inner, (n, places)),
    }


FORMS = {
    "factors": (factors, SHAPE),
    "one place": (lambda: factors(places=1), SHAPE),
    "tokens": (tokens, Shape(1, 3, 7)),
    "columns": (lambda: {"columns": torch.randn(5, SHAPE.numel).double()}, SHAPE),
}


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_does_what_its_columns_do(form, small, monkeypatch):
    if small:  # in portions
        monkeypatch.setattr(per_sample, "AT_ONCE", 1)
    build, shape = FORMS[form]
    own = build()
    columns = explicit(own, shape).flatten(1)
    matrix, weights = torch.randn(*shape).double(), torch.randn(5).double()
    assert columns.shape == (5, shape.numel)
    assert_close(project(own, matrix), columns @ matrix.flatten())
    assert_close(combine(own, weights, shape).flatten(), weights @ columns)
    assert_close(gram(own, shape), columns @ columns.T)
    assert_close(explicit(conform(own, shape, True, 0), shape).flatten(1), columns)
    padded = conform(own, shape, False, 6)
    assert_close(explicit(padded, shape).flatten(1), columns)
    both = stacked([own, padded], shape)
    assert_close(explicit(both, shape).flatten(1), torch.cat([columns, columns]))
    assert_close(gram(both, shape), torch.cat([columns, columns]) @ torch.cat([columns, columns]).T)


def test_tokens_are_what_one_hot_rows_are():
    own = tokens()
    one_hot = torch.nn.functional.one_hot(own["tokens"].clamp_min(0), 7).double()
    one_hot[own["tokens"] < 0] = 0
    written = {"left": own["left"], "right": one_hot.unsqueeze(2)}
    assert_close(explicit(own, Shape(1, 3, 7)), explicit(written, Shape(1, 3, 7)))


def test_thinning_takes_every_row_alike():
    order = torch.Generator().manual_seed(0)
    hits = torch.zeros(8)
    for _ in range(400):
        kept = thinned({"columns": torch.arange(8.0)[:, None], "order": torch.rand(8, generator=order)}, 3)
        assert len(kept["columns"]) == 3
        assert kept["columns"].flatten().tolist() == sorted(kept["columns"].flatten().tolist())
        hits[kept["columns"].flatten().long()] += 1
    assert bool((hits > 100).all())
    assert bool((hits < 200).all())


def drawn(sketch, x, seed, size):
    generator = torch.Generator().manual_seed(seed)
    map_ = sketch.draw(x.shape[1], size, generator)
    return map_, sketch.apply(map_, x, size)


def test_all_sketches_are_tested():
    assert set(SKETCHES) == set(Sketch.__subclasses__())


@pytest.mark.parametrize("kind", SKETCHES)
def test_sketches_are_linear_repeatable_and_unbiased(kind):
    sketch, size = kind(), 20
    torch.manual_seed(0)
    x = torch.randn(3, 100).double() * torch.linspace(0.1, 2, 100)
    map_, once = drawn(sketch, x, 1, size)
    assert once.shape == (3, size)
    assert torch.equal(once, drawn(sketch, x, 1, size)[1])
    assert not torch.equal(once, drawn(sketch, x, 2, size)[1])
    weights = torch.randn(3).double()
    assert_close(sketch.apply(map_, weights @ x, size), weights @ once)
    grams = torch.stack([(s := drawn(sketch, x, seed, size)[1]) @ s.T for seed in range(600)])
    exact = x @ x.T
    assert_close(grams.mean(0).trace(), exact.trace(), rtol=0.05, atol=0.0)
    assert_close(grams.mean(0), exact, rtol=0.0, atol=0.06 * float(exact.diagonal().max()))


@pytest.mark.parametrize("kind", SKETCHES)
def test_sketches_refuse_sizes_that_cannot_be(kind):
    with pytest.raises(ValueError, match=r"size=0.*1 or more"):
        kind(0)
    assert kind().wanted(7) == 112
    assert kind(9).wanted(7) == 9


@pytest.mark.parametrize("size", [256, 1024])
@pytest.mark.parametrize("kind", [CountSketch])
def test_the_error_of_a_direction_is_that_of_its_effective_dimension(kind, size):
    """At most 1.5 sqrt(d_eff / q) over draws (specs: about 0.7)."""
    torch.manual_seed(0)
    shape, n, damping = Shape(1, 40, 100), 48, 0.05
    columns = torch.randn(n, shape.numel).double() * torch.linspace(2, 0.05, n).double()[:, None]
    columns = columns / columns.square().sum(1).max().sqrt() * n**0.5
    own = {"columns": columns, "mean": torch.ones(n).double()}
    gradient = columns.mean(0).view(shape)
    exact = direction(SampleSpace(), own, gradient, damping)
    spectrum = torch.linalg.eigvalsh(columns @ columns.T / n)
    effective = float((spectrum / (spectrum + damping)).sum())
    errors = [
        float((direction(SampleSpace(sketch=kind(size)), own, gradient, damping, s) - exact).norm() / exact.norm())
        for s in range(8)
    ]
    assert 0 < sum(errors) / len(errors) <= 1.5 * (effective / size) ** 0.5


def direction(space, own, gradient, damping, seed=0, fresh=False):
    shape = Shape(*gradient.shape)
    product, kept = space.digest(own, shape, torch.Generator().manual_seed(seed))
    root, good = space.factor("U", product, product.new_full((1,), damping))
    assert bool(good.all())
    kept = {**kept, "U": root, **({"fresh": torch.empty(0)} if fresh else {})}
    return space.precondition(kept, gradient, damping)


@pytest.mark.parametrize("damping", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("form", FORMS)
def test_directions_solve_the_dense_system(form, damping):
    build, shape = FORMS[form]
    own = build()
    own["mean"] = torch.ones(5).double()
    columns = explicit(own, shape).flatten(1)
    for fresh, gradient in itertools.product((False, True), (columns.mean(0), torch.randn(shape.numel).double())):
        dense = SampleSpace().dense({"columns": columns / 5**0.5}, shape, damping)
        solved = torch.linalg.solve(dense, gradient)
        mine = direction(SampleSpace(), own, gradient.view(shape), damping, fresh=fresh)
        assert_close(mine.flatten(), solved, rtol=1e-8, atol=1e-9 * float(solved.abs().max()))


def test_the_mean_of_the_columns_needs_no_difference_of_large_numbers():
    """In single precision at a damping of 5e-8 of the largest eigenvalue (specs: 3e-7 against 7e-3)."""
    torch.manual_seed(0)
    columns = torch.randn(20, 300)
    own, gradient = {"columns": columns, "mean": torch.ones(20)}, columns.mean(0).view(1, 1, 300)
    damping = 5e-8 * float(torch.linalg.eigvalsh(columns @ columns.T / 20).max())
    exact = {k: v.double() for k, v in own.items()}
    true = direction(SampleSpace(), exact, columns.double().mean(0).view(1, 1, 300), damping, fresh=True)
    errors = [
        float((direction(SampleSpace(), own, gradient, damping, fresh=fresh).double() - true).norm() / true.norm())
        for fresh in (True, False)
    ]
    assert errors[0] < 5e-6 < errors[1]


def test_factors_are_cut_for_products_and_whole_for_the_rest():
    torch.manual_seed(0)
    shape = Shape(1, 6, 5)
    own = {**factors(4, 6, shape), "mean": torch.ones(4).double()}
    own["left"] = own["left"] * torch.logspace(0, -3, 6).double().view(1, -1, 1, 1)
    _, kept = SampleSpace(rank=2).digest(own, shape, torch.Generator())
    assert kept["short_left"].shape == (4, 2, 1, 6)
    cut = torch.einsum("nso,nsi->noi", kept["short_left"][:, :, 0], kept["short_right"][:, :, 0]) * 2
    for mine, left, right in zip(cut, own["left"][:, :, 0], own["right"][:, :, 0]):
        u, s, v = torch.linalg.svd(left.T, full_matrices=False)  # the best approximation of left of this rank
        assert_close(mine, (u[:, :2] * s[:2]) @ v[:2] @ right)
    gradient = torch.randn(1, 6, 5).double()
    exact = direction(SampleSpace(), own, gradient, 0.1)
    close, far = (direction(SampleSpace(rank=k), own, gradient, 0.1) for k in (4, 1))
    assert (close - exact).norm() < 0.05 * exact.norm()
    assert (close - exact).norm() < (far - exact).norm()
    assert_close(direction(SampleSpace(rank=6), own, gradient, 0.1), exact)


@pytest.mark.parametrize(
    ("c", "threshold", "rho"), [(2, 100, 15 / 4), (2, 10, 3 / 2 * 5 / 2), (40, 100, 1.0), (4, 10, 5 / 4)]
)
def test_the_release_overrates_curvature(c, threshold, rho):
    """Spec 1.4: (lambda I + rho F)^-1 g with rho = D / q, or the product of both sides' ratios."""
    shape, legacy = Shape(1, 3, 5), Legacy(c, threshold)
    assert legacy.boost(shape) == pytest.approx(rho)
    own = {"columns": torch.randn(6, 15).double(), "mean": torch.ones(6).double()}
    gradient = torch.randn(15).double()
    fisher = own["columns"].T @ own["columns"] / 6
    solved = torch.linalg.solve(rho * fisher + 0.2 * torch.eye(15).double(), gradient)
    mine = direction(SampleSpace(legacy=legacy), own, gradient.view(shape), 0.2)
    assert_close(mine.flatten(), solved, rtol=1e-9, atol=1e-11)


def test_the_mean_field_is_the_formula_and_far_off():
    torch.manual_seed(0)
    shape = Shape(1, 3, 5)
    own = {**factors(6, 2, shape), "mean": torch.ones(6).double()}
    gradient, damping = torch.randn(1, 3, 5).double(), 0.3
    columns = explicit(own, shape).flatten(1)
    gram_ = columns @ columns.T / 6 + damping * torch.eye(6).double()
    b = torch.linalg.solve(gram_, columns @ gradient.flatten() / 6**0.5)
    s = b.abs().sqrt()
    left = torch.einsum("n,nso->os", s, own["left"][:, :, 0] / 6**0.5)
    right = torch.einsum("n,nsi->si", b / s.sum(), own["right"][:, :, 0])
    mine = direction(SampleSpace(legacy=Legacy(100, 1, mean_field=True)), own, gradient, damping)
    assert_close(mine[0], (gradient[0] - left @ right) / damping)
    exact = direction(SampleSpace(), own, gradient, damping)
    assert (mine - exact).norm() > 0.05 * exact.norm()


def test_a_layer_over_its_budget_keeps_fewer_samples():
    layer = layer_of(nn.Conv2d(4, 8, 3).double())
    moment = SampleSpace(samples=50, budget=4 * 296 * 7).statistics[0]
    draw = Sampler(0, 0, 0, 1.0).draw(0, 0, torch.device("cpu"))
    x = torch.randn(20, 4, 9, 9).double()
    assert numbers(layer, 49) == 8 * (36 + 1)
    assert len(moment.before(layer, x, draw).inputs) == 7
    assert moment.most(layer, 49) == 7


@pytest.mark.parametrize("module", [nn.Embedding(50, 4, padding_idx=3), nn.Embedding(5, 4)])
def test_embeddings_keep_tokens_where_those_are_fewer(module):
    layer = layer_of(module.double())
    moment = SampleSpace().statistics[0]
    x = torch.randint(5, (6, 9))
    dy = torch.randn(6, 9, 4).double()
    own = moment.after(layer, moment.before(layer, x, lambda total, wanted: None), dy, None)
    assert ("tokens" in own) == (module.num_embeddings == 50)
    written = torch.einsum("nso,nsi->noi", dy, layer.rows(x).view(6, 9, -1))
    assert_close(explicit(own, layer.shape)[:, 0], written)
