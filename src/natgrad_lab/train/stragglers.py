"""Which ranks keep the others waiting: their own seconds for data and passes, compared every so many steps.

Seconds for messages do not tell: all ranks wait for the slowest one. One sum of a number a rank is sent each time.
"""

import socket
from statistics import median

import torch

from natgrad.parallel import World
from natgrad_lab.train.ranks import everybody

EVERY = 50
"""Steps over which seconds are added up before ranks are compared."""
TIMES = 2.0
"""A rank that takes so many times as long as the middle one of the others is a straggler."""


class Stragglers:
    """Adds up this rank's seconds; all ranks call it alike."""

    def __init__(self, world: World, every: int = EVERY) -> None:
        self.world, self.every = world, every
        self.seconds, self.steps = 0.0, 0
        self.told: set[str] = set()

    def add(self, stages: dict[str, float]) -> dict[str, float]:
        """Count a step's own seconds. Return who is found to be a straggler for the first time ("rank 3 on host-b"),
        and how many times as long as the others it takes.
        """
        self.seconds += stages.get("data", 0.0) + stages.get("network", 0.0)
        self.steps += 1
        if self.world.size == 1 or self.steps < self.every:
            return {}
        found = torch.zeros(self.world.size, dtype=torch.float64)
        found[self.world.rank] = self.seconds
        self.world.sum([found], "scalars")
        self.seconds, self.steps = 0.0, 0
        slow = slower(found.tolist())
        if not slow:
            return {}
        own = [f"rank {self.world.rank} on {socket.gethostname()}"] if self.world.rank in slow else []
        names = {int(name.split()[1]): name for name in everybody(self.world, own)}
        fresh = {names[rank]: times for rank, times in slow.items() if names[rank] not in self.told}
        self.told |= fresh.keys()
        return fresh


def slower(seconds: list[float]) -> dict[int, float]:
    """The stragglers among ranks that take so many seconds, and how many times as long as the others they take."""
    found: dict[int, float] = {}
    for rank, own in enumerate(seconds):
        others = median(seconds[:rank] + seconds[rank + 1 :])
        if others > 0 and own >= TIMES * others:
            found[rank] = own / others
    return found
