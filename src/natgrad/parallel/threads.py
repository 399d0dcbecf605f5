"""Ranks as threads of one process: the same collectives without processes, so many ranks are tested in a second."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from natgrad.parallel.transport import Pending, Transport
from natgrad.parallel.world import World


class Threads:
    """One rank among threads that meet at a barrier and read each other's tensors."""

    def __init__(self, rank: int, size: int, board: list, barrier: threading.Barrier):
        self.rank, self.size = rank, size
        self._board, self._barrier = board, barrier

    def _meet(self, thing: Any) -> list[Any]:
        """What every rank brings, on every rank."""
        self._board[self.rank] = thing
        self._barrier.wait()
        everyone = list(self._board)
        self._barrier.wait()  # nobody writes again before all have read
        return everyone

    def all_reduce(self, buffer: Tensor, op: str = "sum") -> Tensor:
        stacked = torch.stack(self._meet(buffer.detach().clone()))
        return buffer.copy_(stacked.sum(0) if op == "sum" else stacked.amax(0))

    def reduce_scatter(self, chunks: Sequence[Tensor]) -> Pending:
        mine = torch.stack([c[self.rank] for c in self._meet([c.detach().clone() for c in chunks])]).sum(0)
        return lambda: mine

    def all_gather(self, chunk: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        chunks = self._meet(chunk.detach().clone())
        assert [len(c) for c in chunks] == list(lengths)
        return chunks

    def split(self, per_host: int) -> tuple[Transport, Transport]:
        host, place = divmod(self.rank, per_host)
        inside = self._among([host * per_host + k for k in range(per_host)])
        return inside, self._among(list(range(place, self.size, per_host)))

    def _among(self, members: list[int]) -> Threads:
        """The threads of these ranks, which meet at a board and a barrier of their own."""
        first = self.rank == members[0]
        made = ([None] * len(members), threading.Barrier(len(members), timeout=120)) if first else None
        board, barrier = self._meet(made)[members[0]]
        return Threads(members.index(self.rank), len(members), board, barrier)

    def all_to_all(self, buffer: Tensor, out: Sequence[int], into: Sequence[int]) -> Tensor:
        parts = [letters[self.rank] for letters in self._meet(buffer.detach().clone().split(list(out)))]
        assert [len(part) for part in parts] == list(into)
        return torch.cat(list(parts))

    def exchange(self, out: Mapping[int, Tensor], into: Mapping[int, Tensor]) -> None:
        letters = self._meet({r: t.detach().clone() for r, t in out.items()})
        for rank, tensor in into.items():
            tensor.copy_(letters[rank][self.rank])


def run_threads(size: int, work: Callable[[World], Any], **options: Any) -> list[Any]:
    """Run work(world) on `size` threads, each a rank of one world, and return their results in order.

    `options` go to every World. The first exception of any rank is raised here.
    """
    barrier = threading.Barrier(size, timeout=120)
    board: list = [None] * size
    results: list = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(World(Threads(rank, size, board, barrier), **options))
        except BaseException as error:
            errors.append(error)
            barrier.abort()  # the others must not wait for a rank that is gone

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results
