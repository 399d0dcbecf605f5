"""The only place that talks to other ranks."""

from natgrad.parallel.join import join, leave, sharded_by
from natgrad.parallel.message import Message
from natgrad.parallel.placement import place, place_parts
from natgrad.parallel.row_exchange import bring
from natgrad.parallel.threads import run_threads
from natgrad.parallel.world import OwnedTensor, World

__all__ = [
    "Message",
    "OwnedTensor",
    "World",
    "bring",
    "join",
    "leave",
    "place",
    "place_parts",
    "run_threads",
    "sharded_by",
]
