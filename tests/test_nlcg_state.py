"""NLCG saved and loaded: exact, in any precision, on any number of ranks."""

import io

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (  # noqa: TID251  (what trainers call)
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.testing import assert_close

import natgrad
from helpers import Mixed, backward, clone, mlp, points, quiet, train, weights
from multi import share
from natgrad.parallel import run_threads
from nlcg_choices import METRICS, QUIET, nlcg, told
from test_state import behind

every_metric = pytest.mark.parametrize("metric", METRICS)


def disk(saved):
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@every_metric
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_same_run(metric, checkpoint, dtype):
    step = natgrad.Scheduled("step", period=2, tau=0.02)
    options = {**METRICS[metric], "step": step, "weight_decay": 0.01, "beta": natgrad.optim.polak_ribiere}
    model = mlp().to(dtype)
    opt = nlcg(model, **options)
    told(opt, model, [points(16, k, dtype) for k in range(5)])
    copy = clone(model)
    new = nlcg(copy, **options)
    if checkpoint:
        saved = disk(get_optimizer_state_dict(model, opt))
        set_optimizer_state_dict(copy, new, saved)
    else:
        new.load_state_dict(disk(opt.state_dict()))
    assert new.memory == opt.memory
    assert new.memory.steps == 5
    for p, q in zip(model.parameters(), copy.parameters()):
        for key, value in opt.state[p].items():
            assert torch.equal(new.state[q][key], value), key
            assert value.dtype != torch.bfloat16, key
    ends = [told(o, m, [points(16, 5 + k, dtype) for k in range(5)]) for o, m in ((opt, model), (new, copy))]
    assert ends[0] == ends[1]
    assert torch.equal(weights(model), weights(copy))


def test_a_whole_state_loads_on_any_number_of_ranks(double):
    step = natgrad.Scheduled("step", period=2, tau=0.02)

    def go(model, world, first, last, state=None):
        opt = nlcg(model, step=step, world=world)
        if state is not None:
            opt.load_state_dict(state)
        for k in range(first, last):
            told(opt, model, [share(Mixed.batch(24, k), world)])
        return weights(model), disk(opt.gather_state_dict()), vars(opt.memory)

    start = Mixed()

    def begin(world):
        model = clone(start)
        return model, *go(model, world, 0, 5)

    model, _, state, _ = run_threads(3, begin)[0]
    ends = [run_threads(r, lambda world: go(clone(model), world, 5, 9, state)) for r in (1, 2, 4)]
    for rows in ends:
        for found, _, memory in rows:
            assert_close(found, ends[0][0][0], rtol=1e-7, atol=1e-10)
            assert memory == rows[0][2]


def test_resuming_a_model_with_a_layer_that_is_used_otherwise():
    model = behind()
    options = {"preconditioner": natgrad.spngd_blocks, "step": QUIET, "damping": 0.03}
    opt = nlcg(model, **options)
    quiet(train, opt, model, [points(16, k) for k in range(3)])
    assert opt.memory.steps == 3
    assert {r.curvature for r in opt.coverage()} == {"kronecker", "none (plain gradient)"}
    copy = clone(model)
    new = nlcg(copy, **options)
    quiet(new.load_state_dict, disk(opt.state_dict()))
    for k in range(3, 6):
        for m, o in ((model, opt), (copy, new)):
            quiet(train, o, m, [points(16, k)])
        assert torch.equal(weights(model), weights(copy))


def test_gradients_may_leave_early_and_weights_be_rounded():
    """World(overlap=True, weights=torch.bfloat16), with the loss told all the same."""

    start = Mixed()  # threads share the generator, so ranks must not draw their own

    def go(world):
        model = clone(start)
        opt = nlcg(model, step=natgrad.Scheduled("online", tau=0.02), world=world)
        for k in range(6):
            opt.step(loss=backward(model, share(Mixed.batch(24, k), world)))
            opt.zero_grad()
        return weights(model), opt.memory

    (alone, memory), *_ = run_threads(1, go)
    for options in ({"overlap": True}, {"weights": torch.bfloat16}):
        results = run_threads(2, go, **options)
        assert torch.equal(results[0][0], results[1][0])
        assert results[0][1] == results[1][1]
        assert_close(results[0][0], alone, rtol=3e-2, atol=3e-3)
        assert results[0][1].multiplier == pytest.approx(memory.multiplier, rel=0.1)
