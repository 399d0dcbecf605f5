"""Who owns which layer: costs in, owners out. A pure function, so every rank decides the same without a message."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

WORTH = 1e7  # multiplications that are worth a message to another rank, some tenths of a millisecond


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


def place_parts(parts: Sequence[Sequence[float]], ranks: int) -> list[list[int]]:
    """The rank of every part of every item: an item stays whole unless it is more than an equal share of all work.

    Splitting costs a message of the part's result, so an item is only split where it would hold everybody up, and
    where its work is worth a message (WORTH). An idle rank is more use than a short message is a loss.
    """
    share = sum(map(sum, parts)) / ranks
    pieces: list[list[tuple[int, int]]] = []  # of (item, part), each piece on one rank
    for k, costs in enumerate(parts):
        whole = [(k, part) for part in range(len(costs))]
        split = sum(costs) > share and sum(costs) - max(costs) > WORTH
        pieces += [[piece] for piece in whole] if split else [whole]
    owners = place([sum(parts[k][part] for k, part in piece) for piece in pieces], ranks)
    result = [[0] * len(costs) for costs in parts]
    for piece, owner in zip(pieces, owners):
        for k, part in piece:
            result[k][part] = owner
    return result
