"""Who is far behind: contenders at one size of batch wait for each other after the first round of tuning.

A contender's progress is what its best point has lowered the held-out loss by, from that of an even guess over all
classes, ln(classes). A contender that has made less than a given share of the leader's progress is far behind: one of
its points goes on. The decision follows from the results of the first round alone, so a second start decides alike.
"""

import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from natgrad_lab.compare.tasks import Batch


@dataclass(frozen=True)
class Standing:
    """What a cell asks after its first round: whether its contender is far behind."""

    contender: str
    batch: Batch
    runs: list[Any]
    """The results of the contender's best point."""


class Race:
    """Collects the standings of all contenders at one size of batch, then answers all of them at once."""

    def __init__(self, contenders: int, decide: Callable[[list[Standing]], list[bool]]) -> None:
        self.contenders, self.decide = contenders, decide
        self.waiting: list[tuple[Standing, Future[Any]]] = []

    def join(self, standing: Standing) -> "Future[Any]":
        """Return whether the contender is far behind, as soon as all contenders have joined."""
        future: Future[Any] = Future()
        self.waiting.append((standing, future))
        if len(self.waiting) == self.contenders:
            for far, (_, other) in zip(self.decide([one for one, _ in self.waiting]), self.waiting):
                other.set_result(far)
        return future


def far_behind(losses: list[float], classes: int, share: float) -> list[bool]:
    """Say of each loss whether its progress is below `share` of the greatest; of none where nobody has made any.

    losses: held-out cross entropies in nats, infinite for a run that diverged.
    """
    progress = [math.log(classes) - loss for loss in losses]
    leader = max(progress)
    return [leader > 0 and one < share * leader for one in progress]
