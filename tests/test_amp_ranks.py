"""Mixed precision on plain ranks: an overflow on one of them skips the step on all, and scales may drift apart."""

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn import functional as F
from torch.testing import assert_close

import natgrad
from helpers import clone, mlp, points, train, weights
from multi import share
from natgrad.parallel import run_threads

BATCHES = [points(16, k, torch.float64) for k in range(4)]


def spngd(model, **options):
    return natgrad.SPNGD(model, **{"lr": 0.05, "rows_per_dim": None, "refresh": 2, **options})


def scaled(start, steps, known, between, **world):
    """Each rank has a scaler of its own; in the steps of `steps` that are None, rank 1 overflows."""

    def work(world):
        model, scaler = clone(start), GradScaler("cpu", init_scale=64.0)
        opt = spngd(model, world=world, scaler=scaler if known else None)
        for batch in steps:
            x, y = share(BATCHES[3] if batch is None else batch, world)
            loss = scaler.scale(F.cross_entropy(model(x), y))
            (loss * float("inf") if batch is None and world.rank == 1 else loss).backward()
            between(opt, scaler, model)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        return weights(model), opt.skipped, scaler.get_scale()

    return run_threads(2, work, **world)


def unscale(opt, scaler, model):
    scaler.unscale_(opt)


def clip(opt, scaler, model):
    opt.average_gradients()
    scaler.unscale_(opt)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def nothing(opt, scaler, model):
    pass


WAYS = {
    "plain": (False, nothing, {}),
    "scaler known": (True, nothing, {}),
    "unscaled": (True, unscale, {}),
    "clipped": (True, clip, {}),
    "early": (True, nothing, {"overlap": True}),
    "early, unscaled": (True, unscale, {"overlap": True}),
    "early, clipped": (True, clip, {"overlap": True}),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_overflow_on_one_rank_skips_the_step_on_all(way, double):
    known, between, world = WAYS[way]
    start = mlp().double()
    model = clone(start)
    train(spngd(model, max_norm=0.1 if between is clip else None), model, BATCHES[:3])
    steps = [BATCHES[0], None, *BATCHES[1:3]]
    results = scaled(start, steps, known, between, **world)
    for final, skipped, _ in results:
        assert_close(final, weights(model), rtol=1e-6, atol=1e-9)
        assert skipped == 1
    assert torch.equal(results[0][0], results[1][0])
    if between is not clip:  # which shows the overflow to everybody
        assert [scale for _, _, scale in results] == [64.0, 32.0]


@pytest.mark.parametrize("way", ["early", "clipped"])
def test_what_leaves_before_the_step_needs_the_scaler(way, double):
    _, between, world = WAYS[way]
    with pytest.raises(ValueError, match=r"sent to other ranks.*scaler="):
        scaled(
            mlp().double(),
            BATCHES[:1],
            False,
            between if way == "early" else lambda o, s, m: o.average_gradients(),
            **world,
        )
