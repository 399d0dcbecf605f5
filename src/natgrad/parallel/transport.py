"""How flat buffers get from rank to rank: four collectives, for one rank, for processes and for threads.

all_reduce(buffer [n], op)     everyone ends with the sum (or maximum) of all buffers
reduce_scatter(chunks)         begun at once; rank r ends with the sum of everyone's chunk r
all_gather(chunk, lengths)     everyone ends with all chunks
exchange(out, into)            each rank sends `out[r]` to rank r and fills `into[r]` from it

Chunks may have any lengths, the same on every rank. Owners rarely own equally much: of ResNet-50 on 107 ranks the
longest chunk is ten times the mean, so a message of equal, padded chunks would carry ten times the payload.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

PADDING = 1.25  # one padded message may carry so much more than the payload, for the calls that it saves

Pending = Callable[[], Tensor]
"""Waits for a message that is under way and returns what it brought."""


class Transport(Protocol):
    """Moves tensors between `size` ranks of which this is `rank`."""

    rank: int
    size: int

    def all_reduce(self, buffer: Tensor, op: str = "sum") -> Tensor: ...

    def reduce_scatter(self, chunks: Sequence[Tensor]) -> Pending: ...

    def all_gather(self, chunk: Tensor, lengths: Sequence[int]) -> list[Tensor]: ...

    def exchange(self, out: Mapping[int, Tensor], into: Mapping[int, Tensor]) -> None: ...


class Alone:
    """One rank is a world too."""

    rank = 0
    size = 1

    def all_reduce(self, buffer: Tensor, op: str = "sum") -> Tensor:
        return buffer

    def reduce_scatter(self, chunks: Sequence[Tensor]) -> Pending:
        return lambda: chunks[0]

    def all_gather(self, chunk: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        return [chunk]

    def exchange(self, out: Mapping[int, Tensor], into: Mapping[int, Tensor]) -> None:
        return None


class Processes:
    """The ranks of a torch.distributed process group."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._globally = [r if group is None else dist.get_global_rank(group, r) for r in range(self.size)]
        backend = str(dist.get_backend(group))
        self._grouped = "nccl" in backend  # its list forms take chunks of any length, in one launch
        # without gloo beside it, what lives on the host (counts, flags, intervals) takes the way over the device
        self._bridge = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else None
        # renamed in torch 2.13, which warns about the old names
        self._scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        self._gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def all_reduce(self, buffer: Tensor, op: str = "sum") -> Tensor:
        sent = self._on_wire(buffer)
        dist.all_reduce(sent, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], self.group)
        return sent.to(buffer.device)

    def reduce_scatter(self, chunks: Sequence[Tensor]) -> Pending:
        lengths, home = [c.numel() for c in chunks], chunks[0].device
        options: dict[str, Any] = {"group": self.group, "async_op": True}
        sent = chunks = [self._on_wire(c) for c in chunks]
        if padding(lengths) <= PADDING:
            mine, sent = chunks[0].new_empty(max(lengths)), [padded(chunks)]
            works = [self._scatter(mine, sent[0], **options)]
        elif self._grouped and chunks[0].is_cuda:
            mine = torch.empty_like(chunks[self.rank])
            works = [dist.reduce_scatter(mine, sent, **options)]
        else:
            mine = chunks[self.rank]
            works = [dist.reduce(c, self._globally[r], **options) for r, c in enumerate(chunks) if len(c)]

        def wait() -> Tensor:
            finish(works)
            sent.clear()  # until now the messages needed them
            return mine[: lengths[self.rank]].to(home)

        return wait

    def all_gather(self, chunk: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        options: dict[str, Any] = {"group": self.group, "async_op": True}
        home, chunk = chunk.device, self._on_wire(chunk)
        if padding(lengths) <= PADDING:
            whole = chunk.new_empty(self.size, max(lengths))
            long = torch.cat([chunk, chunk.new_zeros(max(lengths) - len(chunk))])
            works, chunks = [self._gather(whole.flatten(), long, **options)], list(whole)
        else:
            chunks = [chunk if r == self.rank else chunk.new_empty(n) for r, n in enumerate(lengths)]
            if self._grouped and chunk.is_cuda:
                works = [dist.all_gather(chunks, chunk.clone(), **options)]
            else:
                works = [dist.broadcast(c, self._globally[r], **options) for r, c in enumerate(chunks) if len(c)]
        finish(works)
        return [c[:n].to(home) for c, n in zip(chunks, lengths)]

    def exchange(self, out: Mapping[int, Tensor], into: Mapping[int, Tensor]) -> None:
        incoming = {r: self._on_wire(t) for r, t in sorted(into.items())}
        sends = [
            dist.P2POp(dist.isend, self._on_wire(t), self._globally[r], self.group) for r, t in sorted(out.items())
        ]
        receives = [dist.P2POp(dist.irecv, t, self._globally[r], self.group) for r, t in incoming.items()]
        if sends or receives:
            finish(dist.batch_isend_irecv([*sends, *receives]))
        for r, tensor in into.items():
            if incoming[r] is not tensor:
                tensor.copy_(incoming[r])

    def _on_wire(self, tensor: Tensor) -> Tensor:
        """A tensor where the backend can send it from."""
        return tensor if self._bridge is None or tensor.is_cuda else tensor.to(self._bridge)


def let_go_of_groups() -> None:
    """Import torch.distributed.nn such that its functions do not keep the default process group.

    They have `group=group.WORLD` for a default argument, which is the open group where the module is first imported
    after init_process_group (torch.compiler imports it). destroy_process_group then leaves gloo's threads running, and
    a thread that lets go of a tensor while Python ends is ended in the middle of a destructor: the process aborts with
    "terminate called without an active exception".
    """
    if "torch.distributed.nn.functional" in sys.modules:
        return
    opened = dist.GroupMember.WORLD
    dist.GroupMember.WORLD = None
    try:
        import torch.distributed.nn.functional  # noqa: F401
    finally:
        dist.GroupMember.WORLD = opened


def padding(lengths: Sequence[int]) -> float:
    """How many times its payload a message of equal chunks would be."""
    return max(lengths) * len(lengths) / max(sum(lengths), 1)


def padded(chunks: Sequence[Tensor]) -> Tensor:
    """Chunks one behind the other, each as long as the longest."""
    longest = max(len(c) for c in chunks)
    return torch.cat([part for c in chunks for part in (c, c.new_zeros(longest - len(c)))])


def finish(works: Sequence[Any]) -> None:
    """Wait for every message."""
    for work in works:
        work.wait()


if dist.is_available():
    let_go_of_groups()
