"""A process group of ranks that are not there, and what torch.distributed would send."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from natgrad.parallel.message import Message

HOW = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter", "allreduce_": "all_reduce"}
KINDS = {"all_gather": "parameters", "reduce_scatter": "averages", "all_reduce": "averages"}
"""What FSDP sends: parameters that a pass computes with, and mean gradients."""


@contextmanager
def pretended(ranks: int) -> Iterator[None]:
    """Inside, torch.distributed's default group has so many ranks, of which this process is the first. Nothing is sent.

    Raises:
        ValueError: a process group is open already.

    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ValueError("ranks that are not there cannot stand beside an open process group: close it first")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Listener(TorchDispatchMode):
    """Takes down what FSDP sends. Chunks are those of the ranks of one replica; an all-reduce is among replicas."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Message] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function.overloadpacket.__name__
            if name not in HOW:
                raise ValueError(f"FSDP sends something by {name}, which is no message that is known")
            sizes = sorted(t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, Tensor))
            chunks = (sizes[0],) if HOW[name] == "all_reduce" else (sizes[0],) * (sizes[-1] // sizes[0])
            self.heard.append(Message(HOW[name], KINDS[HOW[name]], chunks))
        return function(*args, **(kwargs or {}))
