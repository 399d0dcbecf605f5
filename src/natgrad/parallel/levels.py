"""Reductions to owners and gatherings in two levels: inside of every host, and between hosts.

A ring through p ranks takes p - 1 latencies, whatever it carries. With L ranks to a host, a reduction first adds up
inside of each host, where the rank at place l takes what the ranks at place l of all hosts own; then the ranks at one
place of their hosts add up among themselves. That is L - 1 latencies inside and p / L - 1 between, and each host still
sends the payload once. A gathering goes the same way back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from natgrad.parallel.transport import Pending, Transport


class TwoLevels:
    """Ranks of hosts with equally many ranks each: rank = host * L + place.

    whole: all ranks, which carry sums and exchanges. inside: the ranks of this host, by place. between: the ranks at
    this rank's place, by host.
    """

    def __init__(self, whole: Transport, inside: Transport, between: Transport):
        self.whole, self.inside, self.between = whole, inside, between
        self.rank, self.size = whole.rank, whole.size

    @property
    def group(self) -> Any:
        """The process group of all ranks, if there is one."""
        return getattr(self.whole, "group", None)

    def all_reduce(self, buffer: Tensor, op: str = "sum") -> Tensor:
        return self.whole.all_reduce(buffer, op)

    def exchange(self, out: Mapping[int, Tensor], into: Mapping[int, Tensor]) -> None:
        self.whole.exchange(out, into)

    def all_to_all(self, buffer: Tensor, out: Sequence[int], into: Sequence[int]) -> Tensor:
        return self.whole.all_to_all(buffer, out, into)

    def split(self, per_host: int) -> tuple[Transport, Transport]:
        return self.whole.split(per_host)

    def reduce_scatter(self, chunks: Sequence[Tensor]) -> Pending:
        places = self.inside.size
        columns = [chunks[place::places] for place in range(places)]  # by place, of every host
        if not sum(map(len, chunks)):
            return lambda: chunks[self.rank]
        pending = self.inside.reduce_scatter([torch.cat(list(column)) for column in columns])

        def wait() -> Tensor:
            lengths = [len(chunk) for chunk in columns[self.inside.rank]]
            mine = pending()
            return self.between.reduce_scatter(mine.split(lengths))() if sum(lengths) else mine

        return wait

    def all_gather(self, chunk: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        places = self.inside.size
        columns = [lengths[place::places] for place in range(places)]
        if not sum(lengths):
            return [chunk] * self.size
        own = columns[self.inside.rank]
        column = torch.cat(self.between.all_gather(chunk, own)) if sum(own) else chunk
        found = self.inside.all_gather(column, [sum(column) for column in columns])
        parts = [whole.split(list(column)) for whole, column in zip(found, columns)]
        return [parts[rank % places][rank // places] for rank in range(self.size)]
