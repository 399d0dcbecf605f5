"""Every wait has a limit, and whoever waits says for whom: ranks that stop, ranks that die, disks that hang."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist  # noqa: TID251  (whose store is lent)

from checkpoints import go_on, saved
from natgrad.parallel import LostRanksError, World, run_threads, waiting
from natgrad.parallel.threads import Threads
from natgrad_lab.__main__ import LOST, main
from natgrad_lab.data import Digits
from natgrad_lab.models import Mlp
from natgrad_lab.train import checkpoint
from natgrad_lab.train.loop import prepare
from natgrad_lab.train.optimizers import Sgd
from natgrad_lab.train.recipe import Recipe
from natgrad_lab.train.saver import Saver

GLOO = "[unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation to complete"
RESET = "[pair.cc:537] Read error [127.0.0.1]:46775: Connection reset by peer."


@pytest.fixture
def store(monkeypatch):
    """The store in which ranks meet."""
    made = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: made)
    monkeypatch.setattr(waiting, "GRACE", 1.0)
    return made


def errors_of(ranks, size, text):
    """What these of so many ranks raise when a message has failed on them."""
    found = {}

    def fail(rank):
        with pytest.raises(LostRanksError) as raised, waiting.waits_for("a sum over all", range(size), rank):
            raise RuntimeError(text)
        found[rank] = raised.value

    threads = [threading.Thread(target=fail, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize(
    ("text", "says"), [(GLOO, "waited 0 s for rank 2 in a sum"), (RESET, "lost the connection to rank 2 in")]
)
def test_those_that_were_left_name_who_was_not(store, text, says):
    found = errors_of([0, 1, 3], 4, text)
    assert sorted(found) == [0, 1, 3]
    for rank, error in found.items():
        assert str(error).startswith(f"rank {rank} has {says}")
        assert "start all ranks again from the last checkpoint" in str(error)
        assert ("--timeout" in str(error)) == (text == GLOO)
        assert error.missing == (2,)
        assert error.first == (rank == 0)


def test_several_that_are_missing(store):
    (error,) = errors_of([5], 30, GLOO).values()
    assert "for ranks 0, 1, 2, 3, 4, 6, 7, 8 and 21 more in" in str(error)
    assert error.first


def test_a_rank_that_comes_when_all_have_given_up(store):
    errors_of([0, 1], 3, GLOO)
    (error,) = errors_of([2], 3, RESET).values()
    assert "the others, who had stopped waiting for this one" in str(error)
    assert error.missing == ()


@pytest.mark.parametrize(("agent", "rank", "missing"), [("True", 1, ()), ("", 1, (0,)), ("", 0, ())])
def test_a_store_that_is_gone(monkeypatch, agent, rank, missing):
    """Without a launcher that keeps it, it was in the process of rank 0."""

    def gone():
        raise RuntimeError("Broken pipe")

    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", gone)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    (error,) = errors_of([rank], 2, RESET).values()
    assert error.missing == missing
    assert ("to rank 0 in" if missing else "store in which ranks meet does not answer") in str(error)


def test_other_errors_are_not_ours():
    with pytest.raises(RuntimeError, match="shapes") as raised, waiting.waits_for("a sum", range(2), 0):
        raise RuntimeError("shapes do not match")
    assert not isinstance(raised.value, LostRanksError)


def test_ranks_that_do_not_come_are_named():
    store = dist.HashStore()
    with pytest.raises(LostRanksError, match=r"ranks 1, 2 of 3 did not come within 0\.2 s: start all of them"):
        waiting.call_roll(store, 0, 3, 0.2)
    store = dist.HashStore()
    threads = [threading.Thread(target=waiting.call_roll, args=(store, rank, 3, 10.0)) for rank in (1, 2)]
    for thread in threads:
        thread.start()
    waiting.call_roll(store, 0, 3, 10.0)
    for thread in threads:
        thread.join()


STOPPED = """
import os, signal, sys
import torch, natgrad
from natgrad.parallel import join
port = sys.argv[1]
os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
torch.set_num_threads(1)
child = os.fork()
os.environ["RANK"] = "0" if child else "1"
join(30.0)
world = natgrad.World(timeout=1.0)
x = torch.ones(3)
world.sum([x])
assert x.tolist() == [2.0] * 3
if not child:
    os.kill(os.getpid(), signal.SIGSTOP)
    os._exit(0)
try:
    world.sum([x])
except natgrad.parallel.LostRanksError as error:
    print(error, error.missing, flush=True)
finally:
    os.kill(child, signal.SIGKILL)
os._exit(0)
"""


@pytest.mark.slow
def test_a_process_that_stops_is_named_after_the_limit(tmp_path):
    """Two processes on gloo, whose own limit is longer."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = [sys.executable, "-c", STOPPED, str(port)]
    ended = subprocess.run(
        words, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert "rank 0 has waited 1 s for rank 1 in a sum over all" in ended.stdout, ended.stderr
    assert ended.stdout.strip().endswith("(1,)")


@pytest.mark.parametrize("first", [True, False])
def test_one_rank_speaks_for_all(monkeypatch, capsys, first):
    def lost(arguments):
        raise LostRanksError("rank 0 has waited 5 s for rank 1", [1], first)

    monkeypatch.setitem(main.__globals__["COMMANDS"], "plan", lost)
    monkeypatch.delenv("NATGRAD_DEBUG", raising=False)
    assert main(["plan"]) == LOST
    assert capsys.readouterr().err == ("natgrad: rank 0 has waited 5 s for rank 1\n" if first else "")


@pytest.mark.parametrize("value", [0, -1.0])
def test_limits_that_cannot_be(value):
    with pytest.raises(ValueError, match="timeout="):
        World(timeout=value)
    with pytest.raises(ValueError, match="a transport has a limit of its own"):
        World(Threads(0, 1, [None], threading.Barrier(1)), timeout=5.0)


RECIPE = Recipe(Digits(), Mlp((6,)), Sgd(), batch=200, steps=8)


def test_a_disk_that_hangs_costs_checkpoints_and_not_the_run(tmp_path, splits, monkeypatch):
    """Rank 1's writes wait until the end of the test; the checkpoint is given up, and so is the next one."""
    free, write = threading.Event(), checkpoint.write_part

    def hang(folder, rank, tensors):
        if rank == 1:
            free.wait(60)
        write(folder, rank, tensors)

    monkeypatch.setattr(checkpoint, "write_part", hang)

    def work(world):
        told = []
        job = prepare(RECIPE, world, splits)
        patience = 0.2 if world.rank == 1 else 60.0  # rank 0 is slow on a busy machine, and waits for its own disk
        saver = Saver(tmp_path, world, 2, lambda kind, **values: told.append((kind, values.get("reason"))), patience)
        world.sum([torch.zeros(1)])
        for step in (2, 4):
            go_on(job, step)
            saver.save(job)
            saver.finish()
        free.set()
        if world.rank == 1:
            saver.given_up.result(60)
        go_on(job, 6)
        saver.save(job)
        saver.patience = 60
        saver.finish()
        return told

    assert run_threads(2, work)[0] == [
        ("not_saved", "the disk of rank 1 was not done in 60 s (--timeout)"),
        ("not_saved", "the disk is still at an earlier checkpoint"),
        ("checkpoint", None),
    ]
    assert checkpoint.found(tmp_path) == [6]


def test_weights_that_cannot_be_written_in_time(tmp_path, splits, monkeypatch):
    from natgrad_lab.train import saver

    free = threading.Event()
    job = prepare(RECIPE, World(), splits)
    saved(job, tmp_path)
    monkeypatch.setattr(checkpoint, "flush", lambda stream: free.wait(60))
    with pytest.raises(ValueError, match=r"was not written in 0\.2 s: see to the disk, and add --resume"):
        saver.write_weights(job, Path(tmp_path / "model.pt"), 0.2)
    free.set()
