"""A model's own random numbers: a function of the seed, the step and the rank."""

import copy
import random
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from natgrad.parallel import World
from natgrad_lab.data import Digits
from natgrad_lab.models import Architecture
from natgrad_lab.train.loop import Clock, build_model, descend, prepare, steps
from natgrad_lab.train.optimizers import KFac, Seng, Sgd, SpNgd
from natgrad_lab.train.randomness import mixed, seed_step
from natgrad_lab.train.recipe import Recipe


@dataclass(frozen=True)
class Dropping(Architecture):
    """A network that leaves units out by torch's generator, and adds what numpy and python draw."""

    def build(self, shape, classes):
        return Net(classes)


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.first, self.last = nn.Linear(64, 32), nn.Linear(32, classes)

    def forward(self, x):
        x = nn.functional.dropout(self.first(x.flatten(1)).relu(), 0.5, self.training)
        return self.last(x) + (random.random() + np.random.random()) * self.training  # noqa: NPY002


RECIPE = Recipe(Digits(), Dropping(), Sgd(lr=0.1), batch=200, steps=7, seed=5)
OPTIMIZERS = [Sgd(lr=0.1), SpNgd(lr=0.05, refresh=2), KFac(lr=0.05, refresh=3), Seng(lr=0.1, refresh=2)]


def weights(job):
    return torch.cat([parameter.detach().flatten() for parameter in job.model.parameters()])


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda settings: type(settings).__name__)
def test_a_run_that_goes_on_draws_what_it_would_have_drawn(splits, optimizer):
    recipe = replace(RECIPE, optimizer=optimizer)
    whole = prepare(recipe, World(), splits)
    kept = {}
    for record in steps(whole):
        if record.step == 3:
            kept = copy.deepcopy((whole.model.state_dict(), whole.optimizer.state_dict()))
    torch.rand(100), np.random.random(3), random.random()  # noqa: NPY002  (whatever happened in between)
    again = prepare(recipe, World(), splits)
    again.model.load_state_dict(kept[0])
    again.optimizer.load_state_dict(kept[1])
    lrs = [recipe.schedule((step - 1) / 7) * 0.1 for step in range(1, 8)]
    for step, batch in zip(range(4, 8), again.sampler.stream(3)):
        for group in again.optimizer.param_groups:
            group["lr"] = lrs[step - 1] * (optimizer.lr / 0.1)
        descend(again, batch, step, Clock(again.device))
    torch.testing.assert_close(weights(again), weights(whole), rtol=0, atol=1e-7)


def test_what_was_drawn_between_steps_changes_nothing(splits):
    quiet, loud = (prepare(RECIPE, World(), splits) for _ in range(2))
    list(steps(quiet))
    for _ in steps(loud):
        torch.rand(17), np.random.random(17), random.random()  # noqa: NPY002
        loud.score()
    assert torch.equal(weights(quiet), weights(loud))


def test_seeds_steps_and_ranks_have_numbers_of_their_own():
    places = list(product(range(4), range(50), range(8)))
    found = {}
    for place in places:
        seed_step(*place)
        found[place] = (torch.rand(1).item(), np.random.random(), random.random())  # noqa: NPY002
    for kind in range(3):
        assert len({numbers[kind] for numbers in found.values()}) > 0.999 * len(places)
    seed_step(2, 30, 5)
    assert (torch.rand(1).item(), np.random.random(), random.random()) == found[2, 30, 5]  # noqa: NPY002


def test_mixed_numbers_are_whole_and_below_what_torch_takes():
    numbers = {mixed(seed, step) for seed in (-1, 0, 1, 2**63) for step in range(1000)}
    assert len(numbers) == 4000
    assert all(0 <= number < 2**63 for number in numbers)


def test_a_build_is_seeded_whatever_it_draws_from(splits):
    @dataclass(frozen=True)
    class Drawn(Architecture):
        def build(self, shape, classes):
            net = Net(classes)
            nn.init.constant_(net.first.weight, float(np.random.random()))  # noqa: NPY002
            nn.init.constant_(net.last.weight, random.random())
            return net

    one, other = (build_model(replace(RECIPE, model=Drawn())).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
