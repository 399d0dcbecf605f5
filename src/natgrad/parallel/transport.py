"""How flat buffers get from rank to rank: three collectives, for one rank, for processes and for threads.

all_reduce(buffer [n], op)        everyone ends with the sum (or maximum) of all buffers
reduce_scatter(chunks [ranks, n]) rank r ends with the sum of everyone's chunk r
all_gather(chunk [n])             everyone ends with all chunks [ranks, n]
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Transport(Protocol):
    """Moves tensors between `size` ranks of which this is `rank`."""

    rank: int
    size: int

    def all_reduce(self, buffer: Tensor, op: str = "sum") -> Tensor: ...

    def reduce_scatter(self, chunks: Tensor) -> Tensor: ...

    def all_gather(self, chunk: Tensor) -> Tensor: ...


class Alone:
    """One rank is a world too."""

    rank = 0
    size = 1

    def all_reduce(self, buffer: Tensor, op: str = "sum") -> Tensor:
        return buffer

    def reduce_scatter(self, chunks: Tensor) -> Tensor:
        return chunks[0]

    def all_gather(self, chunk: Tensor) -> Tensor:
        return chunk.unsqueeze(0)


class Processes:
    """The ranks of a torch.distributed process group."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        # renamed in torch 2.13, which warns about the old names
        self._scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        self._gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def all_reduce(self, buffer: Tensor, op: str = "sum") -> Tensor:
        dist.all_reduce(buffer, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], self.group)
        return buffer

    def reduce_scatter(self, chunks: Tensor) -> Tensor:
        mine = torch.empty_like(chunks[0])
        self._scatter(mine, chunks.flatten(), group=self.group)
        return mine

    def all_gather(self, chunk: Tensor) -> Tensor:
        chunks = chunk.new_empty(self.size * chunk.numel())
        self._gather(chunks, chunk, group=self.group)
        return chunks.view(self.size, -1)
