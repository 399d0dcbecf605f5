"""Entering and leaving the world that a launcher has made."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from natgrad.parallel.world import World


def join() -> World:
    """The world that torchrun's environment describes (gloo on CPUs, NCCL on GPUs); a world of one without it."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        store, rank, size = next(dist.rendezvous("env://"))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # the launcher's own store lives over all attempts: what the last one has left there must not be found. Not
            # so where rank 0 makes one for each attempt; there hosts may have counted unlike numbers of attempts.
            store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size)
    return World()


def leave() -> None:
    """Close the process group, if one is open."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
