"""Entering and leaving the world that a launcher has made."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from natgrad.parallel.waiting import LostRanksError, call_roll, waits_for
from natgrad.parallel.world import World

TIMEOUT = 600.0
"""Seconds after which a rank that does not come, or takes no part in a message, is given up."""


def join(timeout: float = TIMEOUT, **options: Any) -> World:
    """The world that torchrun's environment describes (gloo on CPUs, NCCL on GPUs); a world of one without it.

    timeout: seconds, see World. options: go to World.

    Raises:
        LostRanksError: names the ranks that have not come in time.

    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        limit = timedelta(seconds=timeout)
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=limit))
        except RuntimeError as error:
            raise LostRanksError(_alone(str(error), timeout), (), True) from None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # the launcher's own store lives over all attempts: what the last one has left there must not be found. Not
            # so where rank 0 makes one for each attempt; there hosts may have counted unlike numbers of attempts.
            store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        call_roll(store, rank, size, timeout)
        with waits_for("the first connection", range(size), rank):
            dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=limit)
    return World(**options)


def _alone(why: str, timeout: float) -> str:
    """What is said where ranks do not find each other."""
    rank, came = os.environ["RANK"], re.search(r"(\d+)/(\d+) clients joined", why)
    if came:
        return f"rank {rank} waited {timeout:g} s and {came[1]} of {came[2]} ranks came: start all of them"
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return (
        f"rank {rank} found nobody at {where} within {timeout:g} s: start the host of rank 0, or see whether this host "
        "reaches it"
    )


def leave() -> None:
    """Close the process group, if one is open."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
