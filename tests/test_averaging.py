"""Who averages gradients over ranks: the optimizer in step, the user with reduce(), or a wrapper."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import natgrad
from helpers import OPTIMIZERS, Net, made
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


@pytest.mark.parametrize("said", ["auto", "averaged"])
def test_gradients_that_somebody_averaged_are_left_alone(said, double):
    """What DistributedDataParallel does, by hand."""
    model, batches = Net(), [Net.batch(24, k) for k in range(5)]
    (expected, _), *_ = run(1, model, batches, build_plain)

    def average(opt):
        opt.world.mean([p.grad for g in opt.param_groups for p in g["params"]])

    for final, opt in run(3, model, batches, build_plain, average, gradients=said):
        assert_close(final, expected, **SAME)
        assert "gradients" not in opt.traffic()


def build_plain(model, world):
    return natgrad.SPNGD(model, lr=0.02, rows_per_dim=None, world=world)


def test_a_change_of_mind_about_averaging_is_refused(double):
    batches = [Net.batch(24, k) for k in range(3)]
    steps = {}

    def now_and_then(opt):
        steps[opt.world.rank] = steps.get(opt.world.rank, 0) + 1
        if steps[opt.world.rank] == 1:
            opt.world.mean([p.grad for g in opt.param_groups for p in g["params"]])

    with pytest.raises(ValueError, match=r'World\(gradients="local"\)'):
        run(2, Net(), batches, build_plain, now_and_then)


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
