"""Timing operations on one device."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from natgrad.layers.op_cost import OpCost

CACHES = 96e6
"""Bytes that no cache holds."""
MOST = 256
BUDGET = 0.25
"""Seconds for one figure, after a first time that does not count."""


class Bench:
    """Times operations on one device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.times = 8 if device.type == "cuda" else 1  # as many more samples, so that it has something to do

    def seconds(self, work: Callable[[], Any]) -> float:
        """The lower quartile of the times that fit into the budget: neighbours make it longer, nothing shorter."""
        self.once(work)
        taken, start = [], time.perf_counter()
        while len(taken) < 5 or (time.perf_counter() - start < BUDGET and len(taken) < 2000):
            taken.append(self.once(work))
        return statistics.quantiles(taken, n=4)[0]

    def once(self, work: Callable[[], Any]) -> float:
        """Seconds of the processor where that does the work: others on the same cores do not count."""
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        start = clock()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return clock() - start

    def normal(self, *shape: int) -> Tensor:
        """Random numbers."""
        return torch.randn(shape, device=self.device)

    def cold(self, *shape: int) -> Callable[[], Tensor]:
        """Gives one after the other of so many tensors that none stays in cache, as in the passes of a network."""
        first = self.normal(*shape)
        count = min(MOST, max(2, math.ceil(CACHES / (4 * first.numel()))))
        return partial(next, cycle([first, *(first.clone() for _ in range(count - 1))]))

    def rate(self, work: OpCost, call: Callable[[], Any]) -> tuple[float, float]:
        """(size, operations or bytes a second), the launch left out."""
        whole = self.seconds(call)
        taken = max(whole / 4, whole - work.calls * self.launch)
        if work.flops:
            return work.size, work.flops / taken
        return work.bytes / max(work.calls, 1), work.bytes / taken

    launch = 0.0

    def measure_launch(self) -> float:
        """Seconds of the host for one small operation: the mean of some that natgrad uses."""
        x, y = self.normal(1, 4, 4), self.normal(1, 4, 4)

        def some() -> None:
            for _ in range(20):
                torch.cat([(x + y).flatten(), x.mul(2.0).view(-1)]).unsqueeze(0)

        self.launch = self.seconds(some) / (20 * 4)  # views are launched too, at a third of the cost
        return self.launch
