"""Processes that come and go as users' do: groups that open late, ranks that run out, checkpoints, and a clean end."""

import os
import warnings

import pytest
import torch
import torch.distributed as dist  # noqa: TID251  (what users do)
import torch.distributed.checkpoint as dcp  # noqa: TID251
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.algorithms.join import Join  # noqa: TID251
from torch.distributed.checkpoint.state_dict import (  # noqa: TID251
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional as F

import natgrad
from helpers import Net, backward, train, weights
from test_gloo import free_port

RANKS = 2
QUIET = natgrad.Scheduled(feedback=None)
KINDS = {
    "SPNGD": lambda m: natgrad.SPNGD(m, lr=0.05),
    "SENG": lambda m: natgrad.SENG(m, lr=0.1, damping=0.1, refresh=2, block="network"),
    "NLCG": lambda m: natgrad.NLCG(m, lr=0.1, step=QUIET),
    "NLCG, curvature": lambda m: natgrad.NLCG(m, preconditioner=natgrad.spngd_blocks, step=natgrad.CurvatureStep()),
}


def threads_of_gloo():
    names = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/comm") as file:
            names.append(file.read().strip())
    return [name for name in names if "gloo" in name]


def built(seed=0):
    torch.manual_seed(seed)
    return Net().double()


def spread(model):
    """The largest difference between ranks' weights."""
    own = weights(model)
    total = own.clone()
    dist.all_reduce(total)
    return float((total / RANKS - own).abs().max())


def late_group(rank, port):
    """A group that opens after the optimizer was built is refused at the first step."""
    model = built()
    opt = natgrad.SPNGD(model, lr=0.1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    backward(model, Net.batch(8, rank))
    try:
        opt.step()
    except ValueError as error:
        return str(error)
    return "it stepped"


def uneven(name, wrapped, rank):
    """Rank 1 has batches for two steps, rank 0 for four, with a learning rate that falls."""
    model = built()
    outer = nn.parallel.DistributedDataParallel(model) if wrapped else model
    opt = KINDS[name](outer)
    plan = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1 / (1 + k))
    with Join([outer, opt] if wrapped else [opt]):
        for k in range(2 if rank else 4):
            x, y = Net.batch(8, 10 * rank + k)
            opt.zero_grad()
            F.cross_entropy(outer(x), y).backward()
            opt.step(**({"forward": lambda x=x: model(x)} if "curvature" in name else {}))
            plan.step()
    return spread(model), weights(model)


def checkpoints(folder, rank):
    """What comes back from a checkpoint of shards, and what is said of one that holds rank 0's part alone."""
    model = built()
    opt = natgrad.SPNGD(model, lr=0.05, damping=0.03)
    train(opt, model, [Net.batch(8, 10 * rank + k) for k in range(3)])
    saved = get_optimizer_state_dict(model, opt)
    dcp.save({"opt": saved}, checkpoint_id=folder)
    other = built()
    other.load_state_dict(model.state_dict())
    fresh = natgrad.SPNGD(other, lr=0.05, damping=0.03)
    template = get_optimizer_state_dict(other, fresh)
    dcp.load({"opt": template}, checkpoint_id=folder)
    set_optimizer_state_dict(other, fresh, template)
    same = all(
        torch.equal(value, fresh.state[q][key])
        for p, q in zip(model.parameters(), other.parameters())
        for key, value in opt.state[p].items()
    )
    whole = get_optimizer_state_dict(model, opt, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    box = [whole if rank == 0 else None]
    dist.broadcast_object_list(box)  # as if every rank had read rank 0's file
    part = built()
    part.load_state_dict(model.state_dict())
    again = natgrad.SPNGD(part, lr=0.05, damping=0.03)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        set_optimizer_state_dict(part, again, box[0], options=StateDictOptions(full_state_dict=True))
    told = [str(w.message) for w in caught if "measured again" in str(w.message)]
    train(again, part, [Net.batch(8, 20 + 10 * rank + k) for k in range(3)])
    measured = all(cell.ready and not cell.lost(rank) for cell in again.cells) and spread(part) == 0
    gathered = opt.gather_state_dict()
    third = natgrad.SPNGD(built(), lr=0.05, damping=0.03)
    third.load_state_dict(gathered)
    kept = all(
        torch.equal(value, third.state[q][key])
        for p, q in zip(model.parameters(), third._model.parameters())
        for key, value in opt.state[p].items()
    )
    return same, told, measured, kept


def warned(rank):
    """What is said of a state of two ranks, by the way in which it is asked for."""
    model = built()
    opt = natgrad.SPNGD(model, lr=0.05, damping=0.03)
    train(opt, model, [Net.batch(8, rank)])
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    asking = {
        "get_optimizer_state_dict": lambda: get_optimizer_state_dict(model, opt),
        "get_state_dict": lambda: get_state_dict(model, opt),
        "stateful": lambda: dcp.save({"opt": opt}, storage_writer=Nowhere("/")),
        "full_state_dict": lambda: get_optimizer_state_dict(model, opt, options=full),
        "state_dict": opt.state_dict,
    }
    found = {}
    for name, ask in asking.items():
        opt.said.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ask()
        found[name] = sum("holds this rank's part" in str(w.message) for w in caught)
    return found


class Nowhere(dcp.FileSystemWriter):
    """Writes nothing."""

    def set_up_storage_writer(self, is_coordinator, *args, **kwargs):
        pass

    def prepare_local_plan(self, plan):
        return plan

    def prepare_global_plan(self, plans):
        return plans

    def write_data(self, plan, planner):
        done = torch.futures.Future()
        done.set_result([])
        return done

    def finish(self, metadata, results):
        pass


def work(rank, port, folder, results):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {"late": late_group(rank, port)}
    for name in KINDS:
        for wrapped in (False, True):
            found[name, wrapped] = uneven(name, wrapped, rank)
    found["checkpoints"] = checkpoints(folder, rank)
    found["warned"] = warned(rank)
    found["owns"] = rank != 0
    dist.destroy_process_group()
    found["threads"] = threads_of_gloo()
    results[rank] = found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both ranks saw, of one start of the processes."""
    folder = str(tmp_path_factory.mktemp("checkpoint") / "shards")
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(work, (free_port(), folder, results), RANKS)
        return [results[rank] for rank in range(RANKS)]


def test_a_group_that_opens_late_is_refused(found):
    assert all("the process group was opened after the optimizer was built" in f["late"] for f in found)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "ddp"])
@pytest.mark.parametrize("name", KINDS)
def test_ranks_that_run_out_of_batches_take_part_until_all_are_done(found, name, wrapped):
    (apart, final), (_, other) = (f[name, wrapped] for f in found)
    assert apart == 0
    assert torch.equal(final, other)
    assert not torch.equal(final, weights(built()))
    if wrapped:  # averaged by the wrapper or by natgrad: the same means
        torch.testing.assert_close(final, found[0][name, False][1], rtol=1e-7, atol=1e-9)


def test_a_checkpoint_of_shards_loses_nothing_and_takes_no_other_ranks_value(found):
    assert all(f["checkpoints"][0] for f in found)


def test_a_part_of_the_state_is_warned_of_where_no_checkpoint_of_all_ranks_joins_it(found):
    right = {"get_optimizer_state_dict": 0, "get_state_dict": 0, "stateful": 0}
    assert [f["warned"] for f in found] == [{**right, "full_state_dict": 1, "state_dict": 1}] * RANKS


def test_what_a_checkpoint_of_rank_0s_part_lacks_is_said_and_measured_again(found):
    """torch's full_state_dict keeps rank 0's plain tensors alone; gather_state_dict() has all."""
    for f in found:
        _, told, measured, kept = f["checkpoints"]
        assert measured
        assert kept
        assert bool(told) == f["owns"]  # whoever owns what rank 0 does not
    texts = [text for f in found for text in f["checkpoints"][1]]
    assert texts
    assert all("measured again" in text for text in texts)


def test_all_threads_of_gloo_end_with_the_group(found):
    """Else one of them may let go of a tensor while Python ends, and the process aborts."""
    assert [f["threads"] for f in found] == [[], []]
