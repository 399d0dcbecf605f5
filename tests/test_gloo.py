"""The border: real processes that talk over gloo."""

import socket
import weakref

import pytest
import torch
import torch.distributed as dist  # noqa: TID251  (what users do)
import torch.multiprocessing as mp
from torch import nn
from torch.testing import assert_close

import natgrad
from helpers import Mixed, Net, backward, train, weights
from natgrad.parallel import placement
from natgrad.parallel.transport import Processes

STEPS, RANKS = 6, 2
MODELS = {"net": Net, "mixed": Mixed, "seng": Mixed}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def build(name, seed=0):
    torch.manual_seed(seed)
    return MODELS[name]().double()


def spngd(model, **options):
    refresh = natgrad.Adaptive(tolerance=0.5, at=24)
    return natgrad.SPNGD(model, lr=0.02, damping=0.03, rows_per_dim=None, refresh=refresh, **options)


def seng(model, **options):
    return natgrad.SENG(model, lr=0.1, damping=0.5, samples=None, refresh=2, **options)


BUILDERS = {"seng": seng}


def work(rank, port, name, wrapped, results):
    """One rank's training. Plain models start unlike: construction brings rank 0's weights."""
    torch.set_num_threads(1)
    placement.WORTH = 0  # layers as small as these are split over ranks too
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    try:
        model = build(name, seed=0 if wrapped in ("before", "after") else rank)
        if wrapped == "before":
            model = nn.parallel.DistributedDataParallel(model)
        opt = BUILDERS.get(name, spngd)(model, world=natgrad.World(overlap=wrapped == "overlap"))
        if wrapped == "after":
            model = nn.parallel.DistributedDataParallel(model)
        for k in range(STEPS):
            backward(model, tuple(t.chunk(RANKS)[rank] for t in MODELS[name].batch(24, k)))
            opt.step()
            opt.zero_grad()
            traffic = opt.traffic()
        whole = opt.gather_state_dict()
        results[rank] = (weights(model), opt.intervals(), traffic, len(whole["state"]))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wrapped"),
    [("mixed", ""), ("net", "before"), ("mixed", "after"), ("mixed", "overlap"), ("seng", ""), ("seng", "before")],
    ids=["plain", "ddp", "ddp later", "overlap", "seng", "seng ddp"],
)
def test_two_processes_are_one_rank(name, wrapped):
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(work, (free_port(), name, wrapped, results), RANKS)
        first, second = results[0], results[1]
    model = build(name)
    opt = BUILDERS.get(name, spngd)(model)
    train(opt, model, [MODELS[name].batch(24, k) for k in range(STEPS)])
    assert torch.equal(first[0], second[0])
    assert_close(first[0], weights(model), rtol=1e-6, atol=1e-9)
    assert first[1] == second[1] == opt.intervals()
    assert ("gradients" in first[2]) == (wrapped in ("", "overlap"))  # a wrapper has sent them already
    assert first[3] == len(opt.state_dict()["state"])


LENGTHS = {"even": [5, 5, 4], "uneven": [3, 0, 50], "one": [0, 0, 7]}


def collected(transport):
    """What every collective brings to this rank."""
    me, got = transport.rank, {}
    for name, lengths in LENGTHS.items():
        waits = [
            transport.reduce_scatter([torch.full((n,), 10.0 * k * (r + 1) + me) for r, n in enumerate(lengths)])
            for k in (1, 2)
        ]
        got[name, "reduce"] = [wait() for wait in reversed(waits)]
        got[name, "gather"] = transport.all_gather(torch.full((lengths[me],), float(me)), lengths)
    into = {r: torch.zeros(2) for r in range(3) if r != me}
    transport.exchange({r: torch.full((2,), 10.0 * me + r) for r in into}, into)
    got["exchange"] = into
    transport.exchange({}, {})
    got["sum"] = transport.all_reduce(torch.full((2,), float(me)))
    return got


SENDERS = ("all_reduce", "reduce", "broadcast", "reduce_scatter_single", "all_gather_single", "P2POp")


def kept(group, times=50):
    """How many tensors the collectives were given, and how many of these a thread of gloo still has behind them."""
    given, alive = [], 0

    def noting(send):
        def call(*args, **options):
            given.extend(weakref.ref(a) for a in args if isinstance(a, torch.Tensor))
            return send(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in SENDERS:
            patch.setattr(dist, name, noting(getattr(dist, name)))
        transport = Processes(group)
        for _ in range(times):
            collected(transport)
            alive += sum(ref() is not None for ref in given)
    return len(given), alive


def messages(rank, port, results):
    """Every collective with chunks of every kind of length, on every other process of the world."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    try:
        dist.new_group([0, 2])
        group = dist.new_group([1, 2, 3])
        if rank == 0:
            return
        direct, bridged = Processes(group), Processes(group)
        bridged._on_wire = torch.clone  # as where tensors of the host take the way over the device
        results[direct.rank] = collected(direct), collected(bridged), kept(group)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_chunks_of_any_length_travel_between_processes():
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(messages, (free_port(), results), 4)
        brought = [(me, got) for me, (*both, _) in results.items() for got in both]
        tensors = [last for *_, last in results.values()]
    assert len(brought) == 6
    for given, alive in tensors:  # a thread that drops one later may lock up whoever destroys the group
        assert given > 50 * len(SENDERS)
        assert alive == 0
    for me, got in brought:
        for name, lengths in LENGTHS.items():
            for k, value in zip((2, 1), got[name, "reduce"]):
                assert torch.equal(value, torch.full((lengths[me],), 3 * 10.0 * k * (me + 1) + 0 + 1 + 2))
            for r, value in enumerate(got[name, "gather"]):
                assert torch.equal(value, torch.full((lengths[r],), float(r)))
        for r, value in got["exchange"].items():
            assert torch.equal(value, torch.full((2,), 10.0 * r + me))
        assert torch.equal(got["sum"], torch.full((2,), 3.0))


@pytest.fixture
def group():
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_group_of_one_is_a_world(group):
    model = build("net")
    other = build("net")
    for m, world in ((model, None), (other, dist.group.WORLD)):
        train(spngd(m, world=world), m, [Net.batch(8, k) for k in range(3)])
    assert torch.equal(weights(model), weights(other))
