"""Large batches on few devices: parts that add up are the step of the larger world, statistics included."""

import copy
import threading
import weakref
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from natgrad.parallel import World, run_threads
from natgrad_lab.data import Digits, Images, Regularisation, Splits
from natgrad_lab.models import Architecture, Mlp
from natgrad_lab.train import loop
from natgrad_lab.train.loop import prepare, steps
from natgrad_lab.train.optimizers import KFac, Nlcg, Seng, Sgd, SpNgd
from natgrad_lab.train.recipe import Recipe

BATCH = 16_384
OPTIMIZERS = {
    "sgd": Sgd(lr=0.1, nesterov=True, weight_decay=1e-3),
    "spngd": SpNgd(lr=0.1, rows_per_dim=None, refresh=1, weight_decay=1e-3),
    "kfac": KFac(lr=0.1, rows_per_dim=None, refresh=2),
    "nlcg": Nlcg(lr=0.3),
    "nlcg kronecker": Nlcg(lr=0.1, preconditioner="kronecker", rows_per_dim=None, refresh=2),
    "nlcg curvature": Nlcg(lr=1.0, step="curvature"),
}


@dataclass(frozen=True)
class Double(Architecture):
    """A small convolutional network in float64."""

    def build(self, shape, classes):
        return Widened(
            nn.Sequential(
                nn.Conv2d(shape[0], 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 3 * 3, classes)
            ).double()
        )


class Widened(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.double())


@pytest.fixture(scope="module")
def splits():
    """20,000 images that are digits with noise, so that no two are alike."""
    digits = Digits().load().train
    places = torch.arange(20_000) % len(digits)
    noise = torch.rand(20_000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images = Images(digits.images[places] + 3 * noise, digits.labels[places], 10, digits.mean, digits.std)
    return Splits(images, images.take(torch.arange(100)))


def weights(job):
    return torch.cat([parameter.detach().flatten() for parameter in job.model.parameters()])


@pytest.fixture
def on_ranks(splits, monkeypatch):
    """Train on some ranks; of each: the weights, how far they went, the losses, the intervals."""

    def train(ranks, **values):
        recipe = Recipe(Digits(), Double(), **{"batch": BATCH, "micro_batch": 2048, "steps": 4, **values})
        built = loop_build(recipe)
        monkeypatch.setattr(loop, "build_model", lambda _: copy.deepcopy(built))  # threads share one generator

        def work(world):
            job = prepare(recipe, world, splits)
            before = weights(job)
            losses = [record.loss for record in steps(job)]
            return weights(job), weights(job) - before, losses, getattr(job.optimizer, "intervals", dict)()

        return run_threads(ranks, work)

    loop_build = loop.build_model
    return train


def check(one, two):
    ((alone, moved, losses, intervals),) = one
    assert alone.dtype == torch.float64
    assert moved.norm() > 1e-2 * alone.norm()
    for found, _, told, ages in two:
        torch.testing.assert_close(found, alone, rtol=1e-8, atol=1e-10)
        assert told == pytest.approx(losses, rel=1e-6)
        assert ages == intervals


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_16384_by_accumulation_on_one_rank_are_two_ranks_of_8192(on_ranks, name):
    check(*(on_ranks(ranks, optimizer=OPTIMIZERS[name]) for ranks in (1, 2)))


def test_seng_of_all_samples_by_accumulation_is_two_ranks_too(on_ranks):
    """512 samples: of 16,384, the matrix that is solved would take 2 GB."""
    small = {"optimizer": Seng(lr=0.3, refresh=2, samples=None), "batch": 512, "micro_batch": 64}
    check(*(on_ranks(ranks, **small) for ranks in (1, 2)))


def test_seng_of_256_out_of_16384_samples_is_the_same_in_the_mean_over_draws(on_ranks):
    """One rank and two draw unlike samples; their mean steps differ by no more than draws do."""
    draws = 8

    def steps_of(ranks):
        settings = [Seng(lr=0.3, sampling_seed=100 * ranks + seed) for seed in range(draws)]
        return torch.stack([on_ranks(ranks, optimizer=one, steps=1)[0][1] for one in settings])

    one, two = steps_of(1), steps_of(2)
    spread = ((one.var(0) + two.var(0)).sum() / draws).sqrt()
    assert (one.mean(0) - two.mean(0)).norm() < 2 * spread
    assert spread < 0.5 * one.mean(0).norm()


def test_no_more_than_a_part_goes_through_the_network_at_once(splits):
    """And what autograd keeps of a part is gone when the next one comes."""
    recipe = Recipe(Digits(), Double(), SpNgd(lr=0.1, refresh=1), batch=BATCH, micro_batch=512, steps=2)
    job = prepare(recipe, World(), splits)
    alive, most, lock = [0], [0], threading.Lock()

    class Counted:
        def __init__(self, tensor):
            self.bytes, self.tensor = tensor.numel() * tensor.element_size(), tensor
            with lock:
                alive[0] += self.bytes
                most[0] = max(most[0], alive[0])

        def __del__(self):
            with lock:
                alive[0] -= self.bytes

    with torch.autograd.graph.saved_tensors_hooks(Counted, lambda counted: counted.tensor):
        list(steps(job))
    assert alive[0] == 0
    whole = BATCH * (64 + 36 * 2 + 10 * 2) * 8
    assert 0 < most[0] < whole / 16


@pytest.mark.parametrize(("mixup", "kept"), [(0.0, False), (0.4, True)])
def test_a_share_is_kept_for_one_more_pass_only_where_it_cannot_be_made_again(splits, mixup, kept):
    recipe = Recipe(Digits(), Double(), OPTIMIZERS["nlcg curvature"], batch=2048, micro_batch=512, steps=2)
    recipe = replace(recipe, regularisation=Regularisation(mixup=mixup))
    job = prepare(recipe, World(), splits)
    seen, values = [], []

    def look(module, inputs):
        seen.append(weakref.ref(inputs[0]))
        values.append(inputs[0].clone())

    job.model.register_forward_pre_hook(look)
    alive = []
    job.optimizer.register_step_pre_hook(lambda *_: alive.append(sum(ref() is not None for ref in seen)))
    next(steps(job))
    assert alive == [4 if kept else 1]  # the last part is still a name of the loop
    assert len(values) == 12
    assert all(torch.equal(values[k], values[k % 4]) for k in range(12))


def test_gradients_that_leave_early_wait_for_the_last_part(splits):
    def work(world, overlap):
        optimizer = SpNgd(lr=0.05, overlap=overlap)
        job = prepare(Recipe(Digits(), Mlp((16,)), optimizer, batch=50, micro_batch=10, steps=4), world, splits)
        return [step.loss for step in steps(job)]

    early, late = (run_threads(2, lambda world, o=o: work(world, o))[0] for o in (True, False))
    assert early == pytest.approx(late, rel=1e-5)
