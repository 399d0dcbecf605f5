"""The only place that talks to other ranks."""

from natgrad.parallel.agreement import RanksDifferError, compare
from natgrad.parallel.block_sharding import blocks_of, check_replicas, mesh_of, shard, whole_of
from natgrad.parallel.join import TIMEOUT, join, leave
from natgrad.parallel.message import Message
from natgrad.parallel.placement import place, place_parts
from natgrad.parallel.pretended import Listener, pretended
from natgrad.parallel.row_exchange import bring
from natgrad.parallel.sharding import (
    ShardedWorld,
    Sharding,
    fsdp_modules,
    is_sharded,
    like,
    local_of,
    reshard,
    sharding_of,
    spread_to_replicas,
    writes,
)
from natgrad.parallel.threads import run_threads
from natgrad.parallel.waiting import LostRanksError, named
from natgrad.parallel.world import OwnedTensor, World

__all__ = [
    "TIMEOUT",
    "Listener",
    "LostRanksError",
    "Message",
    "OwnedTensor",
    "RanksDifferError",
    "ShardedWorld",
    "Sharding",
    "World",
    "blocks_of",
    "bring",
    "check_replicas",
    "compare",
    "fsdp_modules",
    "is_sharded",
    "join",
    "leave",
    "like",
    "local_of",
    "mesh_of",
    "named",
    "place",
    "place_parts",
    "pretended",
    "reshard",
    "run_threads",
    "shard",
    "sharding_of",
    "spread_to_replicas",
    "whole_of",
    "writes",
]
