"""Training on ranks that are threads, and comparing them with one rank."""

import torch
from torch.testing import assert_close

from helpers import backward, clone, weights
from natgrad.parallel import run_threads

SAME = {"rtol": 1e-6, "atol": 1e-9}


def share(batch, world):
    return tuple(t.chunk(world.size)[world.rank] for t in batch)


def run(ranks, model, batches, build, before=lambda opt: None, **world_options):
    """The final weights, and the optimizer, of every rank."""

    def work(world):
        mine = clone(model)
        if world.rank:
            for p in mine.parameters():
                p.data.add_(1.0)  # construction must bring rank 0's weights
        opt = build(mine, world)
        for batch in batches:
            backward(mine, share(batch, world))
            before(opt)
            opt.step()
            opt.zero_grad()
        return weights(mine), opt

    return run_threads(ranks, work, **world_options)


def check(ranks, model, batches, build, **options):
    (expected, alone), *_ = run(1, model, batches, build)
    results = run(ranks, model, batches, build, **options)
    for final, opt in results:
        assert torch.equal(final, results[0][0])
        assert opt.intervals() == alone.intervals()
    assert_close(results[0][0], expected, **SAME)
    return results
