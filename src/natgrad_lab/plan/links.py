"""What a message takes: latency + bandwidth on two levels, inside a host and between hosts.

A ring passes p - 1 times a p-th of the payload (Thakur, Rabenseifner and Gropp 2005, section 4; NCCL's and gloo's
reduce-scatter and all-gather); an all-reduce is both, or for small ones a tree up and down. A ring over hosts enters
and leaves each host once, so what limits it is a host's link to the others, which its devices share. Where owners own
so unlike amounts that a padded message would carry a quarter more, there is one message an owner instead, each through
all ranks (parallel/transport.py), and p parts of the payload travel, not p - 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from natgrad.parallel import Message
from natgrad.parallel.transport import PADDING, padding
from natgrad_lab.plan.machine import Machine


def seconds(messages: Iterable[Message], machine: Machine, ranks: int, per_host: int | None = None) -> float:
    """The time of these messages one after the other.

    per_host: ranks of a host where reductions to owners and gatherings go in two levels (parallel/levels.py).
    """
    if per_host is None:
        return sum(one(message, machine, ranks) for message in messages)
    return sum(levels(message, machine, ranks, per_host) for message in messages)


def levels(message: Message, machine: Machine, ranks: int, per_host: int) -> float:
    """The time of one message inside of hosts of so many ranks, and then between them; other messages are as before."""
    if message.how not in ("reduce_scatter", "all_gather") or not 1 < per_host < ranks:
        return one(message, machine, ranks)
    columns = [sum(message.chunks[place::per_host]) for place in range(per_host)]
    inside = one(message._replace(chunks=tuple(columns)), machine, per_host)
    # all places of a host send at once, and share its link
    between = machine.inside if hosts(machine, ranks) == 1 else machine.between
    travel = (ranks // per_host - 1) * between.latency + message.payload / between.bandwidth
    return inside + machine.call * machine.share(ranks) + travel


def one(message: Message, machine: Machine, ranks: int) -> float:
    """The time of one message."""
    if ranks == 1:
        return 0.0
    host = machine.call * machine.share(ranks)
    if message.how == "all_reduce":
        payload = message.payload
        return host + min(2 * ring(payload, machine, ranks), 2 * tree(payload, machine, ranks))
    if message.how in ("exchange", "all_to_all"):
        busiest = max(message.chunks)
        return host + steps(machine, ranks) + busiest / narrowest(machine, ranks)
    chunks = message.chunks
    if padding(chunks) <= PADDING:
        return host + ring(max(chunks) * len(chunks), machine, ranks)
    parts = sum(1 for chunk in chunks if chunk)
    if machine.device == "gpu":  # NCCL's grouped form: one launch
        return host + steps(machine, ranks) + parts * machine.inside.latency + whole(message.payload, machine, ranks)
    return parts * (host + hops(machine, ranks)) + whole(message.payload, machine, ranks)


def among_replicas(message: Message, machine: Machine, replicas: int, shards: int) -> float:
    """An all-reduce between ranks that hold the same part (HSDP): rings of the parts of a replica, which go at once and
    share a host's link where replicas are on several hosts.
    """
    beside = 1 if hosts(machine, replicas * shards) == 1 else min(shards, machine.devices)
    link = machine.inside if beside == 1 else machine.between
    latencies = 2 * (replicas - 1) * link.latency
    travel = 2 * (replicas - 1) / replicas * message.payload * beside / link.bandwidth
    return machine.call * machine.share(replicas * shards) + latencies + travel


def ring(payload: float, machine: Machine, ranks: int) -> float:
    """A reduce-scatter or an all-gather of so many bytes."""
    return steps(machine, ranks) + whole(payload, machine, ranks) * (ranks - 1) / ranks


def tree(payload: float, machine: Machine, ranks: int) -> float:
    """Up or down a binary tree, the whole payload at every level."""
    return hops(machine, ranks) + math.ceil(math.log2(ranks)) * whole(payload, machine, ranks)


def hosts(machine: Machine, ranks: int) -> int:
    """How many hosts so many ranks take."""
    return 1 if machine.one_host else math.ceil(ranks / machine.devices)


def narrowest(machine: Machine, ranks: int) -> float:
    """Bytes a second of the narrowest part of a ring."""
    if hosts(machine, ranks) == 1:
        return machine.inside.bandwidth / max(1.0, ranks / machine.devices)
    return min(machine.inside.bandwidth, machine.between.bandwidth)


def whole(payload: float, machine: Machine, ranks: int) -> float:
    """The payload once through the narrowest part."""
    return payload / narrowest(machine, ranks)


def steps(machine: Machine, ranks: int) -> float:
    """The latencies once around a ring of all ranks."""
    count = hosts(machine, ranks)
    crossing = 0 if count == 1 else count
    return (ranks - 1 - crossing + (crossing > 0)) * machine.inside.latency + crossing * machine.between.latency


def hops(machine: Machine, ranks: int) -> float:
    """The latencies from a leaf to the root of a tree of all ranks."""
    count = hosts(machine, ranks)
    inner = math.ceil(math.log2(max(1, min(ranks, -(-ranks // count)))))
    return inner * machine.inside.latency + math.ceil(math.log2(count)) * machine.between.latency
