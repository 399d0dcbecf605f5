"""A step of the loop in parts: micro-batches, blended images, sampled labels, scheduled damping."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from natgrad.parallel import World, run_threads
from natgrad_lab.data import Digits, Regularisation, Regulariser
from natgrad_lab.models import CifarResNet, Mlp
from natgrad_lab.schedules import DampingWarmUp, Piecewise, WarmUp
from natgrad_lab.train import loop
from natgrad_lab.train.loop import prepare, steps
from natgrad_lab.train.optimizers import KFac, Sgd, SpNgd
from natgrad_lab.train.recipe import Recipe, described

MLP = Recipe(Digits(), Mlp((16,)), Sgd(lr=0.1), batch=101, steps=4, seed=3)
BOTH = Regularisation(mixup=0.6, erase=0.5)
SAME = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def shared_start(monkeypatch):
    built = loop.build_model(MLP)
    monkeypatch.setattr(loop, "build_model", lambda _: copy.deepcopy(built))  # threads share one random generator


def weights(job):
    return torch.cat([parameter.detach().flatten() for parameter in job.model.parameters()])


def trained(recipe, world, splits):
    job = prepare(recipe, world, splits)
    return job, list(steps(job))


@pytest.mark.parametrize("optimizer", [Sgd(lr=0.1), SpNgd(lr=0.03, rows_per_dim=None, refresh=1)])
@pytest.mark.parametrize(("ranks", "most"), [(1, 30), (2, 17), (2, 1000)])
def test_parts_are_the_step_of_the_whole_batch(splits, shared_start, optimizer, ranks, most):
    recipe = replace(MLP, optimizer=optimizer, batch=102)
    alone, records = trained(recipe, World(), splits)
    small = replace(recipe, micro_batch=most)
    for job, others in run_threads(ranks, lambda world: trained(small, world, splits)):
        torch.testing.assert_close(weights(job), weights(alone), **SAME)
        assert [r.loss for r in others] == pytest.approx([r.loss for r in records], rel=1e-5)


def test_no_more_than_a_micro_batch_is_taken_at_once_also_when_judging(splits):
    job = prepare(replace(MLP, micro_batch=30, norm_samples=100, model=CifarResNet(8, (4, 4, 4))), World(), splits)
    seen = []
    job.model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    next(steps(job))
    assert seen == [30, 30, 30, 11]
    assert 0 <= job.score().accuracy <= 1
    assert max(seen) == 30


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_trained_on_and_told_is_the_blended_batch(splits, shared_start, ranks):
    recipe = replace(MLP, regularisation=BOTH, micro_batch=20, steps=3)

    def work(world):
        job, seen, losses = prepare(recipe, world, splits), [], []
        job.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        by_hand = Regulariser(BOTH, 10)
        stream = job.sampler.stream()
        for step in steps_of(job):
            batch = next(stream)
            seed = (recipe.seed * 1_000_003 + step.number) * world.size + world.rank
            generator = torch.Generator().manual_seed(seed)
            total = 0.0
            for part, index in enumerate(batch.index.split(20)):
                inputs, targets = by_hand(part, *splits.train.batch(index), generator)
                assert torch.equal(seen.pop(0), inputs)
                total += F.cross_entropy(step.before(inputs), targets, reduction="sum").item()
            losses.append((total * world.size / batch.total, step.loss))
        return losses

    found = run_threads(ranks, work)
    for per_rank in zip(*found):
        expected = sum(own for own, _ in per_rank) / ranks
        assert all(told == pytest.approx(expected, rel=1e-5) for _, told in per_rank)


class Taken:
    """A step that was taken: its number, its loss, and the model as it was before."""

    def __init__(self, number, loss, before):
        self.number, self.loss, self.before = number, loss, before


def steps_of(job):
    taking = steps(job)
    for number in range(1, job.steps + 1):
        before = copy.deepcopy(job.model)
        before._forward_pre_hooks.clear()
        yield Taken(number, next(taking).loss, before)


def test_a_seed_decides_blending_and_erasing(splits):
    recipe = replace(MLP, regularisation=BOTH, micro_batch=40)
    one, same, other = (trained(r, World(), splits)[0] for r in (recipe, recipe, replace(recipe, seed=4)))
    plain, _ = trained(replace(recipe, regularisation=Regularisation()), World(), splits)
    assert torch.equal(weights(one), weights(same))
    assert not torch.allclose(weights(one), weights(other))
    assert not torch.allclose(weights(one), weights(plain))


@pytest.mark.parametrize("optimizer", [SpNgd(lr=0.03, fisher="sampled"), KFac(lr=0.03, refresh=2, fisher="sampled")])
@pytest.mark.parametrize("micro", [None, 60])
def test_labels_are_sampled_where_a_recipe_says_so(splits, optimizer, micro):
    recipe = replace(MLP, optimizer=optimizer, batch=240, steps=8, micro_batch=micro, regularisation=BOTH)
    sampled, records = trained(recipe, World(), splits)  # without sample() the optimizer would refuse its first step
    empirical, _ = trained(replace(recipe, optimizer=replace(optimizer, fisher="empirical")), World(), splits)
    assert records[-1].loss < records[0].loss
    assert not torch.allclose(weights(sampled), weights(empirical))


def test_damping_follows_its_schedule_and_is_told(splits):
    schedule = Piecewise((0.5,), (8.0, 1.0))
    recipe = replace(MLP, optimizer=SpNgd(lr=0.03, damping=1e-2), damping_schedule=schedule)
    scheduled, records = trained(recipe, World(), splits)
    assert [r.second_order["damping"] for r in records] == pytest.approx([0.08, 0.08, 0.01, 0.01])
    constant, records = trained(replace(recipe, damping_schedule=Piecewise((), (1.0,))), World(), splits)
    assert [r.second_order["damping"] for r in records] == [0.01] * 4
    assert not torch.allclose(weights(scheduled), weights(constant))


def test_damping_warm_up_is_its_recursion_in_a_run(splits):
    warm = DampingWarmUp(100.0, length=0.75, steps=6)
    _, records = trained(
        replace(MLP, optimizer=KFac(lr=0.01, damping=1e-3), damping_schedule=warm, steps=8), World(), splits
    )
    damping, c = 0.1, 4 / 6
    for record in records:
        assert record.second_order["damping"] == pytest.approx(damping, rel=1e-9)
        damping = (1 - c) * damping + c * 1e-3


def test_damping_of_what_has_none_is_refused(splits):
    recipe = replace(MLP, damping_schedule=DampingWarmUp())
    for refused in (recipe.check, lambda: prepare(recipe, World(), splits)):
        with pytest.raises(ValueError, match=r"damping_schedule=DampingWarmUp but Sgd has no damping") as said:
            refused()
        assert "\n" not in str(said.value)


def test_tied_momentum_divides_by_the_recipes_rate_and_not_by_the_first_step_of_a_warm_up(splits):
    job = prepare(replace(MLP, optimizer=SpNgd(lr=0.04), schedule=WarmUp(length=0.9, start=0.1)), World(), splits)
    first = next(steps(job))
    assert first.lr == pytest.approx(0.004)
    assert job.optimizer.param_groups[0]["initial_lr"] == 0.04


@pytest.mark.parametrize("value", [0, -2, math.nan])
def test_an_impossible_micro_batch_is_refused(value, splits):
    with pytest.raises(ValueError, match=r"micro_batch=.*--micro-batch"):
        prepare(replace(MLP, micro_batch=value), World(), splits)


def test_a_recipe_with_everything_is_described():
    plain = described(replace(MLP, regularisation=BOTH, damping_schedule=DampingWarmUp()))
    assert plain["regularisation"]["mixup"] == 0.6
    assert plain["damping_schedule"] == {"kind": "DampingWarmUp", "ratio": 100.0, "length": 0.1, "steps": 100}
