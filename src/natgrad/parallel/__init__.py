"""The only place that talks to other ranks."""

from natgrad.parallel.join import join, leave
from natgrad.parallel.message import Message
from natgrad.parallel.placement import place, place_parts
from natgrad.parallel.row_exchange import bring
from natgrad.parallel.sharding import (
    ShardedWorld,
    Sharding,
    is_sharded,
    like,
    local_of,
    reshard,
    sharding_of,
    spread_to_replicas,
)
from natgrad.parallel.threads import run_threads
from natgrad.parallel.world import OwnedTensor, World

__all__ = [
    "Message",
    "OwnedTensor",
    "ShardedWorld",
    "Sharding",
    "World",
    "bring",
    "is_sharded",
    "join",
    "leave",
    "like",
    "local_of",
    "place",
    "place_parts",
    "reshard",
    "run_threads",
    "sharding_of",
    "spread_to_replicas",
]
