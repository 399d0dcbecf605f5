"""How flat buffers get from rank to rank: five collectives, for one rank, for processes and for threads.

all_reduce(buffer [n], op)     everyone ends with the sum (or maximum) of all buffers
reduce_scatter(chunks)         begun at once; rank r ends with the sum of everyone's chunk r
all_gather(chunk, lengths)     everyone ends with all chunks
exchange(out, into)            each rank sends `out[r]` to rank r and fills `into[r]` from it
all_to_all(buffer, out, into)  rank r gets the r-th part of the buffer; returns what came, in the order of the ranks
split(per_host)                the ranks of this rank's host, and those at its place in every host, as transports

Chunks may have any lengths, the same on every rank. Owners rarely own equally much: of ResNet-50 on 107 ranks the
longest chunk is ten times the mean, so a message of equal, padded chunks would carry ten times the payload.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from natgrad.parallel.waiting import waits_for

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

    def all_to_all(self, buffer: Tensor, out: Sequence[int], into: Sequence[int]) -> Tensor: ...

    def split(self, per_host: int) -> tuple[Transport, Transport]: ...


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

    def all_to_all(self, buffer: Tensor, out: Sequence[int], into: Sequence[int]) -> Tensor:
        return buffer

    def split(self, per_host: int) -> tuple[Transport, Transport]:
        return self, self


class Processes:
    """The ranks of a torch.distributed process group.

    timeout: seconds after which a message that some rank does not take part in is given up; None: the group's own.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: float | None = None):
        self.group, self.timeout = group, timeout
        if timeout is not None:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), group)
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._globally = [r if group is None else dist.get_global_rank(group, r) for r in range(self.size)]
        backend = str(dist.get_backend(group))
        self._grouped = "nccl" in backend  # its list forms take chunks of any length, in one launch
        # the devices whose messages threads of gloo carry
        self._threaded = (("cpu",) if self._grouped else ("cpu", "cuda")) if "gloo" in backend else ()
        # without gloo beside it, what lives on the host (counts, flags, intervals) takes the way over the device
        self._bridge = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else None
        # renamed in torch 2.13, which warns about the old names
        self._scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        self._gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def _waits(self, message: str) -> AbstractContextManager[None]:
        """Around a message: where it fails because a rank does not take part, the error names the rank."""
        return waits_for(message, self._globally, self._globally[self.rank])

    def all_reduce(self, buffer: Tensor, op: str = "sum") -> Tensor:
        sent, lent = self._on_wire(buffer), Lent(self._threaded)
        with self._waits("a sum over all"):
            dist.all_reduce(lent(sent), {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], self.group)
        lent.take_back()
        return sent.to(buffer.device)

    def reduce_scatter(self, chunks: Sequence[Tensor]) -> Pending:
        lengths, home, lent = [c.numel() for c in chunks], chunks[0].device, Lent(self._threaded)
        options: dict[str, Any] = {"group": self.group, "async_op": True}
        sent = chunks = [self._on_wire(c) for c in chunks]
        with self._waits("sums to owners"):
            if padding(lengths) <= PADDING:
                mine, sent = chunks[0].new_empty(max(lengths)), [padded(chunks)]
                works = [self._scatter(lent(mine), lent(sent[0]), **options)]
            elif self._grouped and chunks[0].is_cuda:
                mine = torch.empty_like(chunks[self.rank])
                works = [dist.reduce_scatter(mine, sent, **options)]
            else:
                mine = chunks[self.rank]
                works = [dist.reduce(lent(c), self._globally[r], **options) for r, c in enumerate(chunks) if len(c)]

        def wait() -> Tensor:
            with self._waits("sums to owners"):
                finish(works)
            sent.clear()  # until now the messages needed them
            lent.take_back()
            return mine[: lengths[self.rank]].to(home)

        return wait

    def all_gather(self, chunk: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        options: dict[str, Any] = {"group": self.group, "async_op": True}
        home, chunk, lent = chunk.device, self._on_wire(chunk), Lent(self._threaded)
        with self._waits("a gathering from all"):
            if padding(lengths) <= PADDING:
                whole = chunk.new_empty(self.size, max(lengths))
                long = torch.cat([chunk, chunk.new_zeros(max(lengths) - len(chunk))])
                works, chunks = [self._gather(lent(whole.flatten()), lent(long), **options)], list(whole)
            else:
                chunks = [chunk if r == self.rank else chunk.new_empty(n) for r, n in enumerate(lengths)]
                if self._grouped and chunk.is_cuda:
                    works = [dist.all_gather(chunks, chunk.clone(), **options)]
                else:
                    owners = enumerate(chunks)
                    works = [dist.broadcast(lent(c), self._globally[r], **options) for r, c in owners if len(c)]
            finish(works)
        lent.take_back()
        return [c[:n].to(home) for c, n in zip(chunks, lengths)]

    def exchange(self, out: Mapping[int, Tensor], into: Mapping[int, Tensor]) -> None:
        incoming, lent = {r: self._on_wire(t) for r, t in sorted(into.items())}, Lent(self._threaded)
        outgoing = {r: self._on_wire(t) for r, t in sorted(out.items())}
        moves = [dist.P2POp(dist.isend, lent(t), self._globally[r], self.group) for r, t in outgoing.items()]
        moves += [dist.P2POp(dist.irecv, lent(t), self._globally[r], self.group) for r, t in incoming.items()]
        if moves:
            with self._waits("an exchange"):
                finish(dist.batch_isend_irecv(moves))
        moves.clear()
        lent.take_back()
        for r, tensor in into.items():
            if incoming[r] is not tensor:
                tensor.copy_(incoming[r])

    def all_to_all(self, buffer: Tensor, out: Sequence[int], into: Sequence[int]) -> Tensor:
        """One message, in which every rank takes part, also one that sends and receives nothing."""
        home, sent, lent = buffer.device, self._on_wire(buffer), Lent(self._threaded)
        received = sent.new_empty(sum(into))
        with self._waits("an exchange of all with all"):
            dist.all_to_all_single(lent(received), lent(sent), list(into), list(out), group=self.group)
        lent.take_back()
        return received.to(home)

    def split(self, per_host: int) -> tuple[Transport, Transport]:
        """Process groups of every host and of every place in a host; every rank makes all of them."""
        ranks = list(range(self.size))
        inside = [ranks[start : start + per_host] for start in range(0, self.size, per_host)]
        between = [ranks[place::per_host] for place in range(per_host)]
        mine = []
        for members in (*inside, *between):
            limit = None if self.timeout is None else timedelta(seconds=self.timeout)
            group: Any = dist.new_group([self._globally[rank] for rank in members], timeout=limit)
            if self.rank in members:
                mine.append(Processes(group, self.timeout))
        return mine[0], mine[1]

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


def finish(works: list[Any]) -> None:
    """Wait for every message, and let go of it."""
    for work in works:
        work.wait()
    works.clear()


class Lent:
    """Tensors of messages, as aliases that the messages alone hold, so that it shows when they have let go.

    A thread of gloo drops a message some time after it was waited for, and needs Python's lock to drop its tensors. If
    the process group is destroyed meanwhile by somebody who holds this lock (DistributedDataParallel's reducer does),
    both wait for each other; if Python ends meanwhile, the process aborts. So every message is waited for until the
    thread has dropped it too, mostly no time at all.
    """

    PATIENCE = 10.0  # seconds, after which the thread has other trouble

    def __init__(self, kinds: Collection[str]):
        self.kinds = kinds  # of the devices whose messages gloo's threads carry
        self._aliases: list[Any] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.device.type not in self.kinds:
            return tensor
        alias = tensor.detach()
        self._aliases.append(weakref.ref(alias))
        return alias

    def take_back(self) -> None:
        """Wait until no message holds any of them."""
        deadline = time.monotonic() + self.PATIENCE
        for alias in self._aliases:
            while alias() is not None and time.monotonic() < deadline:
                time.sleep(2e-5)  # gives the lock away
        self._aliases.clear()


if dist.is_available():
    let_go_of_groups()
