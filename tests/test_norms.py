"""BatchNorm judged by running statistics: those of all ranks' data taken together."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from natgrad.parallel import World, run_threads
from natgrad_lab.data import Digits
from natgrad_lab.models import CifarResNet
from natgrad_lab.train import loop
from natgrad_lab.train.evaluate import average_norms
from natgrad_lab.train.loop import prepare, steps
from natgrad_lab.train.optimizers import Sgd
from natgrad_lab.train.recipe import Recipe

RECIPE = Recipe(Digits(), CifarResNet(8, (4, 4, 4)), Sgd(lr=0.1), batch=256, steps=120, norms="average")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_unlike_data_on_ranks_give_the_moments_of_all_of_it(ranks):
    torch.manual_seed(0)
    data = [torch.randn(1000, 5) * (1 + rank) + 3 * rank for rank in range(ranks)]

    def work(world):
        net = nn.Sequential(nn.BatchNorm1d(5, momentum=1.0), nn.BatchNorm1d(5, track_running_stats=False))
        net(data[world.rank])
        average_norms(net, world)
        return net[0]

    everything = torch.cat(data)
    for norm in run_threads(ranks, work):
        torch.testing.assert_close(norm.running_mean, everything.mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(norm.running_var, everything.var(0), rtol=2e-3, atol=1e-5)


def test_ranks_judge_by_one_set_of_statistics_and_as_well_as_by_estimates(splits, monkeypatch):
    built = loop.build_model(RECIPE)
    monkeypatch.setattr(loop, "build_model", lambda _: copy.deepcopy(built))  # threads share one random generator

    def work(world):
        job = prepare(RECIPE, world, splits)
        list(steps(job))
        own = [buffer.clone() for buffer in job.model.buffers()]
        score = job.score()
        averaged = [buffer.clone() for buffer in job.model.buffers()]
        job.recipe = replace(RECIPE, norms="estimate")
        return own, score, averaged, job.score()

    (own, score, averaged, estimated), (other_own, other_score, other, _) = run_threads(2, work)
    assert not all(torch.equal(a, b) for a, b in zip(own, other_own))
    assert all(torch.equal(a, b) for a, b in zip(averaged, other))
    assert score == other_score
    assert score.accuracy > 0.8
    assert score.accuracy == pytest.approx(estimated.accuracy, abs=0.1)


def test_one_rank_judges_by_its_own_running_statistics(splits):
    job = prepare(replace(RECIPE, steps=3), World(), splits)
    list(steps(job))
    before = copy.deepcopy(job.model.state_dict())
    job.score()
    assert all(torch.equal(value, before[name]) for name, value in job.model.state_dict().items())
