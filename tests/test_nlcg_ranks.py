"""NLCG over ranks: the weights of one rank, one multiplier bit for bit, and what travels for it."""

import pytest
import torch
import torch.distributed as dist  # noqa: TID251  (what users do)
import torch.multiprocessing as mp
from torch import nn

import natgrad
from helpers import Mixed, Net, backward, clone, weights
from multi import SAME, share
from natgrad.parallel import run_threads
from test_gloo import free_port

LOUD = natgrad.Scheduled("step", period=2, tau=0.02)  # answers to nearly every loss
CHOICES = {
    "default": {"step": LOUD},
    "faithful": {"mode": "faithful", "step": LOUD},
    "online": {"step": natgrad.Scheduled("online", tau=0.02)},
    "identity PR": {"preconditioner": None, "beta": natgrad.optim.polak_ribiere},
    "second moment HZ": {"preconditioner": natgrad.SecondMoment(), "beta": natgrad.optim.hager_zhang, "lr": 0.005},
    "decay": {"weight_decay": 0.01, "step": LOUD, "beta": natgrad.optim.hs_dy, "max_norm": 0.5, "prescale": 0.1},
    "kfac": {
        "preconditioner": natgrad.spngd_blocks,
        "beta": natgrad.optim.polak_ribiere,
        "step": natgrad.CurvatureStep(),
        "lr": 0.5,
        "rows_per_dim": None,
        "damping": 0.1,
    },
    "kfac HZ": {
        "preconditioner": natgrad.spngd_blocks,
        "beta": natgrad.optim.hager_zhang,
        "rows_per_dim": None,
        "damping": 0.1,
    },
    "line": {"step": natgrad.CurvatureStep(), "weight_decay": 0.01},
}


def steps(model, opt, world, count=8, told=True):
    """Train; the multipliers and lengths after every step, all losses told."""
    seen = []
    for k in range(count):
        batch = share(Mixed.batch(24, k) if isinstance(model, Mixed) else Net.batch(24, k), world)
        loss = backward(model, batch)
        if opt.search.feedback is None:
            opt.step(forward=lambda b=batch: model(b[0]))
        else:
            opt.step(loss=loss)
        opt.zero_grad()
        memory = opt.memory
        seen.append((opt.last_beta, memory.multiplier, memory.length, memory.average, memory.delta))
    return seen


def final(ranks, options, model, **world_options):
    def work(world):
        mine = clone(model)
        opt = natgrad.NLCG(mine, **{"lr": 0.05, **options}, world=world)
        seen = steps(mine, opt, world)
        return weights(mine), seen, opt.traffic()

    return run_threads(ranks, work, **world_options)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("model", [Mixed, Net])
def test_ranks_are_one(choice, model, double):
    start = model()
    (alone, expected, _), *_ = final(1, CHOICES[choice], start)
    if CHOICES[choice].get("step") in (LOUD,):
        assert min(row[1] for row in expected) < 1  # the loss was heard
    assert any(row[0] > 0 for row in expected)
    for ranks in (2, 4):
        for owners in (True, False):
            results = final(ranks, CHOICES[choice], start, owners=owners)
            for found, seen, _ in results:
                assert torch.equal(found, results[0][0])
                assert seen == results[0][1]  # bit for bit
                torch.testing.assert_close(found, alone, **SAME)
            torch.testing.assert_close(torch.tensor(results[0][1]), torch.tensor(expected), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("choice", CHOICES)
def test_two_rounds_of_at_most_five_numbers_travel(choice):
    flags = 8 * (1 + 4 + 3)  # who has a gradient, and is it finite
    _, _, traffic = final(2, CHOICES[choice], Net().float().double())[0]
    extra = 8 * (5 + 5 + 3)  # and three of the line
    if CHOICES[choice].get("preconditioner") is not natgrad.spngd_blocks:
        assert traffic["scalars"] <= flags + extra
        assert "statistics" not in traffic
    numel = sum(p.numel() for p in Net().parameters())
    sent = "directions" if isinstance(CHOICES[choice].get("step"), natgrad.CurvatureStep) else "weights"
    assert traffic["gradients"] == traffic[sent] == 8 * numel


def test_a_rank_that_tells_nothing_turns_feedback_off():
    def work(world):
        model = Net().float()
        opt = natgrad.NLCG(model, lr=0.05, world=world)
        x, y = share(Net.batch(8, 0), world)
        backward(model, (x.float(), y))
        if world.rank == 0:
            opt.step(loss=1.0)
        else:
            with pytest.warns(natgrad.NatgradWarning, match="told no loss"):
                opt.step()
        return opt.memory

    memories = run_threads(2, work)
    assert memories[0] == memories[1]
    assert memories[0].told == 0


def process(rank, port, line, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(Net().double())
        options = CHOICES["kfac" if line else "default"]
        opt = natgrad.NLCG(model, **{"lr": 0.05, **options})
        seen = []
        for k in range(6):
            batch = tuple(t.chunk(2)[rank] for t in Net.batch(24, k))
            loss = backward(model, batch)
            opt.step(forward=lambda b=batch: model(b[0])) if line else opt.step(loss=loss)
            opt.zero_grad()
            seen.append(vars(opt.memory))
        results[rank] = (weights(model), seen, opt.traffic())
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("line", [False, True], ids=["scheduled", "curvature step"])
def test_two_wrapped_processes_are_one_rank(line):
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(process, (free_port(), line, results), 2)
        first, second = results[0], results[1]
    torch.manual_seed(0)
    model = Net().double()
    opt = natgrad.NLCG(model, **{"lr": 0.05, **CHOICES["kfac" if line else "default"]})
    for k in range(6):
        batch = Net.batch(24, k)
        loss = backward(model, batch)
        opt.step(forward=lambda b=batch: model(b[0])) if line else opt.step(loss=loss)
        opt.zero_grad()
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]
    assert "gradients" not in first[2]
    torch.testing.assert_close(first[0], weights(model), rtol=1e-6, atol=1e-9)
