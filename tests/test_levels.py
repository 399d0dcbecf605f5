"""Messages inside of hosts and between them bring what one level brings."""

import pytest
import torch
import torch.distributed as dist  # noqa: TID251  (what users do)
import torch.multiprocessing as mp
from torch.testing import assert_close

import natgrad
from helpers import Mixed, made
from multi import check, run
from natgrad.parallel import World, run_threads
from natgrad.parallel.levels import TwoLevels
from natgrad.parallel.transport import Processes
from test_gloo import free_port

LENGTHS = {
    "even": [3, 3, 3, 3, 3, 3],
    "uneven": [1, 0, 40, 2, 5, 0],
    "a place with nothing": [0, 2, 0, 3, 0, 1],
    "one": [0, 0, 0, 9, 0, 0],
    "nothing": [0, 0, 0, 0, 0, 0],
}


def collected(transport, lengths):
    """What every collective brings to this rank. Numbers are whole, so that sums are exact in any order."""
    me = transport.rank
    chunks = [torch.arange(n, dtype=torch.float64) * (me + 1) + r for r, n in enumerate(lengths)]
    waits = [transport.reduce_scatter([k * c for c in chunks]) for k in (1, 2)]
    into = {r: torch.zeros(1, dtype=torch.float64) for r in range(transport.size) if r != me}
    transport.exchange({r: torch.full((1,), 10.0 * me + r, dtype=torch.float64) for r in into}, into)
    return (
        [wait() for wait in waits],
        transport.all_gather(torch.full((lengths[me],), float(me)), lengths),
        sorted(into.items()),
        transport.all_reduce(torch.tensor([float(me)]), "max"),
    )


@pytest.mark.parametrize("per_host", [2, 3])
@pytest.mark.parametrize("name", LENGTHS)
def test_every_collective_brings_the_same(name, per_host):
    def work(world):
        transport = world.transport
        assert isinstance(transport, TwoLevels) == world.two_levels
        return repr(collected(transport, LENGTHS[name]))

    assert run_threads(6, work, per_host=per_host) == run_threads(6, work)


@pytest.mark.parametrize("options", [{}, {"overlap": True}, {"wire": torch.bfloat16}], ids=str)
def test_ranks_of_hosts_end_with_the_weights_of_one(options, double, monkeypatch):
    monkeypatch.setattr("natgrad.parallel.placement.WORTH", 0)
    batches = [Mixed.batch(24, k) for k in range(8)]

    def build(model, world):
        return made(natgrad.SPNGD, model, world=world, lr=0.02, damping=0.03, rows_per_dim=None, refresh=2)

    if "wire" not in options:
        check(4, Mixed(), batches, build, per_host=2, **options)
        return
    model = Mixed()
    flat, hosts = run(4, model, batches, build, **options), run(4, model, batches, build, per_host=2, **options)
    assert all(torch.equal(weights, hosts[0][0]) for weights, _ in hosts)
    assert_close(flat[0][0], hosts[0][0], rtol=0, atol=2e-3)  # rounded in another order


def test_one_host_has_one_level():
    """A recipe for hosts of eight runs on fewer ranks, too."""
    assert not World(natgrad.World.alone().transport, per_host=8).two_levels
    assert run_threads(2, lambda world: world.two_levels, per_host=8) == [False, False]


@pytest.mark.parametrize("per_host", [4, 0])
def test_ranks_that_are_no_hosts_are_refused(per_host):
    with pytest.raises(ValueError, match=f"per_host={per_host}"):
        run_threads(6, lambda world: world.rank, per_host=per_host)


def process(rank, port, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=6)
    try:
        torch.set_num_threads(1)
        levels = World(per_host=3).transport
        assert isinstance(levels, TwoLevels)
        assert levels.group is None
        results[rank] = [(repr(collected(levels, n)), repr(collected(Processes(), n))) for n in LENGTHS.values()]
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_processes_make_groups_of_hosts_and_places():
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(process, (free_port(), results), 6)
        found = dict(results)
    assert len(found) == 6
    for pairs in found.values():
        for levels, flat in pairs:
            assert levels == flat
