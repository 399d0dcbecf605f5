"""Who averages gradients over ranks: the optimizer in step, the user with reduce(), or a wrapper."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import natgrad
from helpers import OPTIMIZERS, Net, heard, made
from multi import SAME, run

every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda o: o.__name__)


def test_reduce_then_clip_equals_max_norm(double):
    batches = [Net.batch(24, k) for k in range(4)]

    def plain(model, world, **options):
        return natgrad.SPNGD(model, lr=0.02, rows_per_dim=None, world=world, **options)

    def clip(opt):
        opt.average_gradients()
        norm = nn.utils.clip_grad_norm_([p for g in opt.param_groups for p in g["params"]], 0.1)
        assert norm > 0.1  # it clips

    expected = run(2, Net(), batches, lambda m, w: plain(m, w, max_norm=0.1))[0][0]
    torch.manual_seed(0)
    model = Net()
    inside = run(2, model, batches, lambda m, w: plain(m, w, max_norm=0.1))[0][0]
    outside, opt = run(2, model, batches, plain, clip)[0]
    assert opt.traffic()["gradients"] == sum(p.numel() * 8 for p in model.parameters())  # sent once, by reduce()
    alone = run(1, model, batches, plain, clip)[0][0]
    assert_close(outside, inside, **SAME)
    assert_close(alone, inside, **SAME)
    assert not torch.equal(expected, outside)


@pytest.mark.parametrize("owners", [None, True])
@pytest.mark.parametrize("said", ["auto", "averaged"])
def test_gradients_that_somebody_averaged_are_left_alone(said, owners, double):
    """What DistributedDataParallel does, by hand."""
    model, batches = Net(), [Net.batch(24, k) for k in range(5)]
    (expected, _), *_ = run(1, model, batches, build_plain)

    def average(opt):
        opt.world.mean([p.grad for g in opt.param_groups for p in g["params"]])

    for final, opt in run(3, model, batches, build_plain, average, gradients=said, owners=owners):
        assert opt.gradients.mode == "averaged"
        assert_close(final, expected, **SAME)
        assert "gradients" not in opt.traffic()


def build_plain(model, world):
    return natgrad.SPNGD(model, lr=0.02, rows_per_dim=None, world=world)


@every_optimizer
@pytest.mark.parametrize("refresh", [1, 1000])
@pytest.mark.parametrize("way", ["averaged", "the same"])
def test_gradients_that_were_alike_and_are_so_no_more_are_averaged_from_then_on(kind, way, refresh, double):
    """Somebody has averaged them in the first two steps, or all ranks had the same samples."""
    batches = [Net.batch(12, k) for k in range(5)]
    if way == "the same":
        batches[:2] = [tuple(part[:6].repeat(2, *[1] * (part.dim() - 1)) for part in own) for own in batches[:2]]

    def build(model, world):
        return made(kind, model, lr=0.02, rows_per_dim=None, refresh=refresh, world=world)

    def early(opt):
        if way == "averaged" and opt.steps_made < 2:
            opt.world.mean([p.grad for g in opt.param_groups for p in g["params"]])

    model = Net()
    (alone, _), *_ = run(1, model, batches, build)
    with heard() as said:
        results = run(2, model, batches, build, early)
    for final, opt in results:
        assert opt.gradients.mode == "local"
        assert torch.equal(final, results[0][0])
        assert_close(final, alone, **SAME)
    assert sum("are each rank's own in this one" in str(w.message) for w in said) == 2


@every_optimizer
@pytest.mark.parametrize(("alike", "scale"), [(0, 0.0), (1, 0.0), (2, 1.0)])
def test_equal_gradients_of_ranks_are_not_taken_for_averaged_ones(kind, alike, scale, double):
    """A batch whose shares are the same on all ranks, or gradients of zero, which say nothing in the first step too."""
    batches = [Net.batch(12, k) for k in range(4)]
    batches[alike] = tuple(part[:6].repeat(2, *[1] * (part.dim() - 1)) for part in batches[alike])

    def build(model, world):
        return made(kind, model, lr=0.02, rows_per_dim=None, refresh=1, world=world)

    def vanish(opt):
        if opt.steps_made == alike:
            for p in (p for g in opt.param_groups for p in g["params"]):
                p.grad.mul_(scale)

    model = Net()
    results = run(2, model, batches, build, vanish)
    (alone, _), *_ = run(1, model, batches, build, vanish)
    for final, opt in results:
        assert opt.gradients.mode == "local"
        assert torch.equal(final, results[0][0])
        assert_close(final, alone, **SAME)
