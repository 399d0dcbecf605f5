"""How flat buffers get from rank to rank: four collectives, for one rank, for processes and for threads.

all_reduce(buffer [n], op)     everyone ends with the sum (or maximum) of all buffers
reduce_scatter(chunks)         begun at once; rank r ends with the sum of everyone's chunk r
all_gather(chunk, lengths)     everyone ends with all chunks
exchange(out, into)            each rank sends `out[r]` to rank r and fills `into[r]` from it

Chunks may have any lengths, the same on every rank. Owners rarely own equally much: of ResNet-50 on 107 ranks the
longest chunk is ten times the mean, so a message of equal, padded chunks would carry ten times the payload.
"""

from __future__ import annotations

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
        self._uneven = dist.get_backend(group) == "nccl"  # its list forms are one grouped launch
        # renamed in torch 2.13, which warns about the old names
        self._scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        self._gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def all_reduce(self, buffer: Tensor, op: str = "sum") -> Tensor:
        dist.all_reduce(buffer, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], self.group)
        return buffer

    def reduce_scatter(self, chunks: Sequence[Tensor]) -> Pending:
        lengths = [c.numel() for c in chunks]
        options: dict[str, Any] = {"group": self.group, "async_op": True}
        sent = list(chunks)
        if padding(lengths) <= PADDING:
            mine, sent = chunks[0].new_empty(max(lengths)), [padded(chunks)]
            works = [self._scatter(mine, sent[0], **options)]
        elif self._uneven:
            mine = torch.empty_like(chunks[self.rank])
            works = [dist.reduce_scatter(mine, sent, **options)]
        else:
            mine = chunks[self.rank]
            works = [dist.reduce(c, self._globally[r], **options) for r, c in enumerate(chunks) if len(c)]

        def wait() -> Tensor:
            finish(works)
            sent.clear()  # until now the messages needed them
            return mine[: lengths[self.rank]]

        return wait

    def all_gather(self, chunk: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        options: dict[str, Any] = {"group": self.group, "async_op": True}
        if padding(lengths) <= PADDING:
            whole = chunk.new_empty(self.size, max(lengths))
            long = torch.cat([chunk, chunk.new_zeros(max(lengths) - len(chunk))])
            works, chunks = [self._gather(whole.flatten(), long, **options)], list(whole)
        else:
            chunks = [chunk if r == self.rank else chunk.new_empty(n) for r, n in enumerate(lengths)]
            if self._uneven:
                works = [dist.all_gather(chunks, chunk.clone(), **options)]
            else:
                works = [dist.broadcast(c, self._globally[r], **options) for r, c in enumerate(chunks) if len(c)]
        finish(works)
        return [c[:n] for c, n in zip(chunks, lengths)]

    def exchange(self, out: Mapping[int, Tensor], into: Mapping[int, Tensor]) -> None:
        sends = [dist.P2POp(dist.isend, t, self._globally[r], self.group) for r, t in sorted(out.items())]
        receives = [dist.P2POp(dist.irecv, t, self._globally[r], self.group) for r, t in sorted(into.items())]
        if sends or receives:
            finish(dist.batch_isend_irecv([*sends, *receives]))


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
