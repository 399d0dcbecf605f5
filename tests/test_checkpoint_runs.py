"""A run goes on as if nothing had happened: on its ranks to the last bit, on others in meaning."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from checkpoints import CONV, CURVED, NAMES, SETTINGS, go_on, recipe_with, saved, weights
from natgrad.parallel import run_threads
from natgrad_lab.data import Regularisation
from natgrad_lab.models import Mlp
from natgrad_lab.train import checkpoint
from natgrad_lab.train.loop import prepare
from natgrad_lab.train.optimizers import SpNgd
from natgrad_lab.train.state import restore


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("optimizer", SETTINGS, ids=NAMES)
def test_a_resumed_run_is_the_same_run_to_the_last_bit(tmp_path, splits, optimizer, ranks):
    recipe = recipe_with(optimizer)

    def straight(world):
        job = prepare(recipe, world, splits)
        first = go_on(job, 5)
        saved(job, tmp_path)
        return first + go_on(job, 9), weights(job), [m.clone() for m in job.average.means], job.score()

    def taken_up(world):
        torch.manual_seed(99)
        job = prepare(recipe, world, splits)
        restore(job, tmp_path / "step-00000005")
        assert job.done == 5
        return go_on(job, 9), weights(job), job.average.means, job.score()

    for a, b in zip(run_threads(ranks, straight), run_threads(ranks, taken_up)):
        assert a[0][5:] == b[0]
        assert all(torch.equal(x, y) for x, y in zip(a[1], b[1]))
        assert all(torch.equal(x, y) for x, y in zip(a[2], b[2]))
        assert a[3] == b[3]


@pytest.mark.parametrize("optimizer", CURVED, ids=[NAMES[k] for k in (2, 4, 5, 6, 8, 9)])
def test_curvature_moves_from_4_ranks_to_2_to_3(tmp_path, splits, optimizer):
    """The state is equal before and after, nothing is measured anew, and the run goes on."""
    recipe = replace(recipe_with(optimizer), steps=40)

    def begin(world):
        job = prepare(recipe, world, splits)
        go_on(job, 3)
        saved(job, tmp_path)
        return job.optimizer.gather_state_dict(), job.optimizer.intervals(), weights(job)

    def move(step):
        def work(world):
            job = prepare(recipe, world, splits)
            restore(job, tmp_path / checkpoint.name_of(step))
            before = job.optimizer.gather_state_dict(), job.optimizer.intervals(), weights(job)
            losses = go_on(job, step + 3)
            saved(job, tmp_path)
            after = job.optimizer.gather_state_dict(), job.optimizer.intervals(), weights(job)
            return before, after, losses

        return work

    state = run_threads(4, begin)[0]
    for ranks, step in ((2, 3), (3, 6)):
        results = run_threads(ranks, move(step))
        for before, _, losses in results:
            assert_same(before, state)
            assert all(0 < loss < 10 for loss in losses)
        state = results[0][1]


def assert_same(one, other):
    assert one[1] == other[1]
    assert all(torch.equal(p, q) for p, q in zip(one[2], other[2]))
    for k, values in other[0]["state"].items():
        assert one[0]["state"][k].keys() == values.keys()
        for key, value in values.items():
            assert torch.equal(one[0]["state"][k][key], value), key
    assert one[0]["param_groups"] == other[0]["param_groups"]


def test_a_run_means_the_same_on_other_ranks(tmp_path, splits):
    """Mixup's partners, gradients and statistics of 4 ranks on 2 and 3: the weights of the undisturbed run."""
    recipe = replace(
        CONV, model=Mlp((12,)), optimizer=SpNgd(lr=0.05, rows_per_dim=None, refresh=2), micro_batch=None, steps=8
    )
    recipe = replace(
        recipe, regularisation=Regularisation(mixup=0.4)
    )  # one share for all: drawn per rank, so set equal

    def straight(world):
        job = prepare(recipe, world, splits)
        same_shares(job)
        go_on(job, 4)
        saved(job, tmp_path)
        go_on(job, 8)
        return weights(job)

    def taken_up(world):
        job = prepare(recipe, world, splits)
        same_shares(job)
        restore(job, tmp_path / "step-00000004")
        go_on(job, 8)
        return weights(job)

    expected = run_threads(4, straight)[0]
    for ranks in (1, 2, 3):
        for found in run_threads(ranks, taken_up):
            assert_close(found, expected, rtol=1e-3, atol=2e-5)


def same_shares(job):
    for part in range(2):
        job.regulariser.mixups[part].draw = lambda count, generator: torch.full((count,), 0.3, dtype=torch.float64)
