"""Who owns which layer: costs in, owners out. A pure function, so every rank decides the same without a message."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def place(costs: Sequence[float], ranks: int) -> list[int]:
    """The owner of each item, so that the busiest rank has little to do: the dearest item first, to the idlest rank.

    Graham's longest-processing-time rule (1969): at most 4/3 of the best possible. Ties go to the lower index and
    the lower rank.
    """
    owners = [0] * len(costs)
    idle = [(0.0, rank) for rank in range(ranks)]
    for item in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        load, rank = heapq.heappop(idle)
        owners[item] = rank
        heapq.heappush(idle, (load + costs[item], rank))
    return owners
