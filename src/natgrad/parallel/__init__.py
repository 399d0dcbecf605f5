"""The only place that talks to other ranks."""

from natgrad.parallel.agreement import RanksDifferError, compare
from natgrad.parallel.join import TIMEOUT, join, leave
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
from natgrad.parallel.waiting import LostRanksError, named
from natgrad.parallel.world import OwnedTensor, World

__all__ = [
    "TIMEOUT",
    "LostRanksError",
    "Message",
    "OwnedTensor",
    "RanksDifferError",
    "ShardedWorld",
    "Sharding",
    "World",
    "bring",
    "compare",
    "is_sharded",
    "join",
    "leave",
    "like",
    "local_of",
    "named",
    "place",
    "place_parts",
    "reshard",
    "run_threads",
    "sharding_of",
    "spread_to_replicas",
]
