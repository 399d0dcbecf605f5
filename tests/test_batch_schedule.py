"""Batches that grow or shrink from epoch to epoch, and schedules that then count in epochs."""

from dataclasses import replace

import pytest
import torch

from natgrad.parallel import World
from natgrad_lab.data import Digits
from natgrad_lab.models import Mlp
from natgrad_lab.schedules import Constant, Piecewise, Polynomial, WarmUp
from natgrad_lab.train.loop import prepare, steps
from natgrad_lab.train.optimizers import Sgd
from natgrad_lab.train.recipe import Recipe

GROWING = Piecewise((0.25, 0.75), (1.0, 2.0, 4.0))
RECIPE = Recipe(Digits(), Mlp((4,)), Sgd(lr=0.1), Polynomial(1.0), batch=300, epochs=4, batch_schedule=GROWING)
LINE = Polynomial(1.0)


def sizes(job):
    """Of every step: samples, and the learning rate over the first."""
    seen, taken = [], []
    job.model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    for record in steps(job):
        taken.append((sum(seen), record.lr / 0.1))
        seen.clear()
    return taken


def test_the_batch_is_that_of_the_epochs_start_and_rates_follow_epochs(splits):
    found = sizes(prepare(RECIPE, World(), splits))
    assert [size for size, _ in found] == [300, 300, 300, 300, 237, 600, 600, 237, 600, 600, 237, 1200, 237]
    progress = [0, 0.05, 0.1, 0.15, 0.2, *(e / 4 + p / 12 for e in (1, 2) for p in (0, 1, 2)), 0.75, 0.875]
    assert [rate for _, rate in found] == pytest.approx([LINE(t) for t in progress])


def test_a_constant_batch_makes_progress_in_steps_to_the_last_bit(splits):
    recipe = replace(RECIPE, batch_schedule=Piecewise((0.5,), (1.0, 1.0)), steps=None)
    job, plain = (prepare(r, World(), splits) for r in (recipe, replace(recipe, batch_schedule=Constant())))
    assert [plain.progress(step) for step in range(20)] == [step / 20 for step in range(20)]
    assert [job.progress(step) for step in range(20)] == pytest.approx([step / 20 for step in range(20)])


def test_a_model_is_judged_at_the_end_of_every_epoch(splits):
    job = prepare(RECIPE, World(), splits)
    assert [step for step in range(1, 14) if job.due(step)] == [5, 8, 11, 13]
    every = prepare(replace(RECIPE, evaluate_every=4), World(), splits)
    assert [step for step in range(1, 14) if every.due(step)] == [4, 8, 12, 13]


def test_a_run_may_end_within_an_epoch(splits):
    job = prepare(replace(RECIPE, epochs=3.5), World(), splits)
    assert job.sampler.batches == (300, 600, 600, 1200)
    assert job.steps == 12


def test_a_batch_is_rounded():
    recipe = replace(RECIPE, batch=100, epochs=3, batch_schedule=WarmUp(length=1.0, start=0.5))
    assert recipe.batches() == (50, 67, 83)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 5}, r"steps=5 beside batch_schedule=Piecewise.*--epochs"),
        ({"batch_schedule": WarmUp()}, r"batch_schedule=WarmUp leaves batch=0 in epoch 0"),
        ({"batch": 500}, r"batch=2000 must be between 1 and the 1437"),
        ({"batch_schedule": Polynomial(0.1, 0.5, 0.51)}, r"leaves batch=0 in epoch 3"),
    ],
)
def test_batches_that_cannot_be_are_refused_in_one_line(splits, change, said):
    with pytest.raises(ValueError, match=said) as refused:
        prepare(replace(RECIPE, **change), World(), splits)
    assert "\n" not in str(refused.value)


def test_training_goes_on_over_changes_of_the_batch(splits):
    job = prepare(replace(RECIPE, epochs=8, batch=100), World(), splits)
    losses = [record.loss for record in steps(job)]
    assert losses[-1] < 0.8 * losses[0]
    assert torch.isfinite(torch.tensor(losses)).all()
