"""Who owns a layer, and who holds its statistics: costs in, ranks out."""

from __future__ import annotations

from collections.abc import Sequence

from natgrad.curvature import Cost
from natgrad.parallel import World, place_parts


def place_layers(costs: Sequence[Cost], world: World) -> list[tuple[int, dict[str, int]]]:
    """(owner, holder of each statistic) of every layer, balanced over ranks by work; without owners all are ours.

    One rank has all of a layer, unless the layer is more than an equal share of everybody's work: then each statistic
    goes where there is time, and the owner is who inverts the dearest one, so that only smaller inverses travel.
    """
    if not world.owners:
        return [(world.rank, dict.fromkeys(cost.factors, world.rank)) for cost in costs]
    parts = []
    for cost in costs:
        factors = sorted(cost.factors.values(), reverse=True) or [0.0]
        parts.append([factors[0] + cost.precondition, *factors[1:]])
    placed = []
    for cost, ranks_of in zip(costs, place_parts(parts, world.size)):
        keys = sorted(cost.factors, key=lambda key: -cost.factors[key])
        placed.append((ranks_of[0], dict(zip(keys, ranks_of))))
    return placed
