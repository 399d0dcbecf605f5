"""Sharded models on gloo: what the tests of FSDP2 run on every rank."""

import socket

import torch
import torch.distributed as dist  # noqa: TID251  (what users do)
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh  # noqa: TID251
from torch.distributed.fsdp import fully_shard  # noqa: TID251
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

import natgrad
from helpers import Mixed, backward
from natgrad.parallel import run_threads

isolate = torch._C._distributed_c10d._set_thread_isolation_mode


class Uneven(Mixed):
    """Mixed, and dimensions that ranks cannot share evenly: 7 words, 5 and 3 outputs, groups, one row, a matrix."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.depthwise = nn.Conv1d(6, 6, 3, padding=1, groups=6, bias=False)
        self.wide = nn.LayerNorm((3, 6))
        self.hidden = nn.Linear(12, 5)
        self.one = nn.Linear(5, 1)
        self.mixing = nn.Parameter(torch.eye(3, 4) + 0.1)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens):
        hidden = self.norm(self.embed(tokens)).transpose(1, 2)
        hidden = torch.tanh(hidden + self.grouped(hidden) + self.depthwise(hidden))
        hidden = self.group(self.conv(hidden)) * self.gain
        hidden = torch.tanh(self.hidden(hidden.flatten(1)))
        hidden = torch.cat([hidden, self.one(hidden)], 1)
        hidden = self.wide((hidden[:, :3, None] * hidden[:, None]) + hidden[:, None]).mean(1)
        return self.head(hidden) + hidden[:, :4] @ self.mixing.T


def built(kind=Uneven, seed=0):
    torch.manual_seed(seed)
    return kind().double()


SPNGD = {"lr": 0.02, "damping": 0.03, "rows_per_dim": None, "refresh": 3, "weight_decay": 1e-3}
TRUST = {"length": natgrad.trust, "rule": natgrad.Momentum(before=True)}
OPTIMIZERS = {
    "spngd": lambda m, **o: natgrad.SPNGD(m, **SPNGD, **o),
    "kfac": lambda m, **o: natgrad.KFAC(m, lr=0.02, damping=0.03, rows_per_dim=None, refresh=3, **o),
    "kfac trust": lambda m, **o: natgrad.KFAC(m, lr=0.02, damping=0.03, rows_per_dim=None, refresh=3, **TRUST, **o),
    "spngd clip": lambda m, **o: natgrad.SPNGD(m, **SPNGD, length=natgrad.KLClip(), max_norm=0.5, **o),
    "nlcg": lambda m, **o: natgrad.NLCG(m, lr=0.05, weight_decay=1e-3, step=natgrad.Scheduled(feedback=None), **o),
    "nlcg curved": lambda m, **o: natgrad.NLCG(
        m,
        lr=0.02,
        preconditioner=natgrad.spngd_blocks,
        rows_per_dim=None,
        damping=0.03,
        refresh=3,
        step=natgrad.Scheduled(feedback=None),
        **o,
    ),
    "seng": lambda m, **o: natgrad.SENG(m, lr=0.1, damping=0.5, samples=None, refresh=2, **o),
    "seng network": lambda m, **o: natgrad.SENG(m, lr=0.1, damping=0.5, samples=None, refresh=2, block="network", **o),
}


def sharded(model, mesh, leaves=("conv", "hidden", "norm"), **options):
    """The model cut over a mesh: some layers by themselves, the rest with the root."""
    for name in leaves:
        fully_shard(getattr(model, name), mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def mesh_of(ranks, replicas=1):
    """Ranks as one row, or as so many replicas."""
    if replicas == 1:
        return init_device_mesh("cpu", (ranks,))
    return init_device_mesh("cpu", (replicas, ranks // replicas), mesh_dim_names=("replicas", "shards"))


def full(model):
    """All weights as one plain vector, on every rank."""
    return torch.cat([whole(p).flatten() for p in model.parameters()])


def whole(tensor):
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def enter(rank, port, ranks, work, args, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    try:
        results[rank] = work(rank, ranks, *args)
    finally:
        dist.destroy_process_group()


def on_ranks(ranks, work, *args):
    """work(rank, ranks, *args) on processes over gloo; their results in order."""
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(enter, (free_port(), ranks, work, args, results), ranks)
        return [results[rank] for rank in range(ranks)]


def on_threads(ranks, work, *args, **options):
    """work(world, *args) on ranks that are threads, to which torch.distributed's default group is theirs."""
    store = dist.HashStore()

    def enter_thread(world):
        dist.init_process_group("threaded", rank=world.rank, world_size=ranks, store=store)
        try:
            return work(world, *args)
        except BaseException as error:
            ProcessLocalGroup.exception_handle(error)  # the others must not wait for a rank that is gone
            raise
        finally:
            dist.destroy_process_group()

    isolate(True)
    _install_threaded_pg()
    try:
        return run_threads(ranks, enter_thread, **options)
    finally:
        _uninstall_threaded_pg()
        ProcessLocalGroup.reset()
        isolate(False)


def train(opt, model, steps, rank=0, ranks=1, kind=Uneven, size=24):
    """Steps on this rank's share of batches; returns the losses."""
    losses = []
    for k in steps:
        losses.append(backward(model, tuple(t.chunk(ranks)[rank] for t in kind.batch(size, k))))
        opt.step()
        opt.zero_grad()
    return losses
