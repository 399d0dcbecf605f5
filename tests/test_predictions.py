"""A sample with many predictions: a mean loss divides their gradients, and curvature makes up for it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import natgrad
from helpers import clone, made, mlp, statistic, weights
from natgrad.parallel import World, run_threads

PLACES = 5


class Flat(nn.Module):
    """Its logits are rows of all places, as a loss wants them."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).flatten(0, 1)


class Pooled(nn.Module):
    """One prediction an image, by a convolution and a mean over its places."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


def texts(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, PLACES, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n, PLACES), generator=generator)


def loss_of(logits, labels, reduction="mean"):
    return F.cross_entropy(logits.reshape(-1, 3), labels.flatten(), reduction=reduction)


def trained(model, batches, kind=natgrad.SPNGD, world=None, reduction="mean", **options):
    own = clone(model).double()
    opt = made(kind, own, lr=0.1, rows_per_dim=None, refresh=1, world=world, reduction=reduction, **options)
    for x, labels in batches:
        loss_of(own(x), labels, reduction).backward()
        opt.step()
        opt.zero_grad()
    return weights(own), opt


@pytest.mark.parametrize("kind", [natgrad.SPNGD, natgrad.KFAC, natgrad.NLCG], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("wrap", [nn.Identity, Flat], ids=["places", "rows"])
def test_places_are_predictions(kind, wrap):
    """Rows that know nothing of each other may come as samples or as places of samples: the same steps."""
    batches = [texts(8, seed) for seed in range(3)]
    apart = [(x.flatten(0, 1), labels.flatten()) for x, labels in batches]
    model = mlp()
    expected, _ = trained(model, apart, kind)
    found, _ = trained(model if wrap is nn.Identity else wrap(model), batches, kind)
    assert_close(found, expected, rtol=1e-9, atol=1e-12)
    told, _ = trained(model if wrap is nn.Identity else wrap(model), batches, kind, predictions=1)
    assert not torch.allclose(told, expected, rtol=1e-4)


@pytest.mark.parametrize("kind", [natgrad.SPNGD, natgrad.KFAC, natgrad.SENG], ids=lambda kind: kind.__name__)
def test_more_predictions_are_less_damping(kind):
    """(p F + l)^-1 = 1/p (F + l/p)^-1: exact for every curvature, also where damping is split between factors."""
    model, batches = mlp(), [texts(8)]
    options = {"length": natgrad.plain, "world": World()}
    found, _ = trained(model, batches, kind, damping=0.1, **options)
    one, _ = trained(model, batches, kind, damping=0.1 / PLACES, predictions=1, **options)
    start = weights(clone(model).double())
    assert_close((found - start) * PLACES, one - start, rtol=1e-8, atol=1e-12)


def images(model, labels, **options):
    own = clone(model).double()
    x = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    opt = natgrad.SPNGD(own, lr=0.1, rows_per_dim=None, **options)
    F.cross_entropy(own(x), labels).backward()
    opt.step()
    return weights(own)


def test_images_of_predictions():
    """A convolution at the end predicts every place; with a mean over places before the loss it predicts one."""
    generator = torch.Generator().manual_seed(2)
    dense, pooled = nn.Conv2d(2, 3, 1), Pooled()
    every, one = torch.randint(3, (6, 4, 4), generator=generator), torch.randint(3, (6,), generator=generator)
    assert torch.equal(images(dense, every), images(dense, every, predictions=16))
    assert not torch.equal(images(dense, every), images(dense, every, predictions=1))
    assert torch.equal(images(pooled, one), images(pooled, one, predictions=1))
    assert not torch.equal(images(pooled, one), images(pooled, one, predictions=16))


def test_sums_need_no_correction():
    """A summed loss has every prediction's gradient as it is: predictions change nothing."""
    model = mlp()
    summed, one = (trained(model, [texts(8)], reduction="sum", predictions=p)[1] for p in (None, 1))
    assert torch.equal(statistic(summed, "0", "G"), statistic(one, "0", "G"))


@pytest.mark.parametrize("kind", [natgrad.SPNGD, natgrad.SENG], ids=lambda kind: kind.__name__)
def test_micro_batches_and_ranks_count_together(kind):
    """Two ranks with two micro-batches each see the predictions of one batch."""
    model, (x, labels) = mlp(), texts(8)
    expected, _ = trained(model, [(x, labels)], kind, world=World())

    def work(world):
        own = clone(model).double()
        opt = made(kind, own, lr=0.1, rows_per_dim=None, refresh=1, world=world)
        mine, wanted = x.chunk(2)[world.rank], labels.chunk(2)[world.rank]
        for part, label in zip(mine.chunk(2), wanted.chunk(2)):
            (loss_of(own(part), label) / 2).backward()
        opt.step()
        return weights(own)

    for found in run_threads(2, work):
        assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_sampled_labels_are_of_the_same_loss():
    """With drawn labels the predictions are counted in the logits; told, they say what the loss averages."""

    def factor(**options):
        own = clone(model)
        opt = natgrad.SPNGD(own, lr=0.1, rows_per_dim=None, fisher="sampled", **options)
        logits = own(x)
        opt.sample(logits.transpose(1, 2))
        loss_of(logits, labels).backward()
        opt.step()
        return statistic(opt, "0", "G")

    (x, labels), model = texts(8), mlp().double()
    assert torch.equal(factor(), factor(predictions=PLACES))
    assert_close(factor(predictions=1), factor() * PLACES)  # a sum over places: longer by p, its squares by p^2 / p


@pytest.mark.parametrize("value", [0, -1.0])
def test_predictions_must_be_some(value):
    with pytest.raises(ValueError, match="predictions"):
        natgrad.SPNGD(mlp(), lr=0.1, predictions=value)


def test_the_minimum_along_a_line_is_of_the_mean_over_places():
    """A step to the minimum is the same whether logits come by samples [n, classes, places] or as rows."""

    def stepped(forward):
        own = clone(model)
        opt = natgrad.NLCG(own, preconditioner=None, step=natgrad.CurvatureStep())
        loss_of(own(x), labels).backward()
        opt.step(forward=lambda: forward(own(x)))
        return weights(own)

    (x, labels), model = texts(8), mlp().double()
    rows = stepped(lambda z: z.flatten(0, 1))
    assert_close(stepped(lambda z: z.transpose(1, 2)), rows)
    curvature = natgrad.spngd_blocks
    assert natgrad.NLCG(clone(model), preconditioner=curvature, predictions=2).engine.predictions == 2
    with pytest.raises(ValueError, match="predictions"):
        natgrad.NLCG(clone(model), predictions=2)
