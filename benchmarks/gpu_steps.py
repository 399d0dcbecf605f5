"""Times steps beside SGD's: the device's time and the host's, memory, and how often the host waits.

One contender is alive at a time, and SGD with it. A round is a block of SGD's steps and a block of the contender's,
without a wait between the steps of a block: the host may run ahead, as in training. A ratio is that of a round.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from gpu_contenders import SGD, Contender, Network
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import natgrad

FEWEST = 3  # rounds


class OutOfTimeError(Exception):
    """There is no time left for a figure that means something."""


class Mark(NamedTuple):
    """A point in the device's queue, and the host's clock when it was put there."""

    event: torch.cuda.Event | None
    clock: float

    def until(self, other: Mark) -> float:
        """Milliseconds of the device from here to there; without one, of the host."""
        if self.event is None or other.event is None:
            return 1e3 * (other.clock - self.clock)
        return self.event.elapsed_time(other.event)


def mark(device: torch.device) -> Mark:
    event = None
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
    return Mark(event, time.perf_counter())


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give back the memory of whatever is no longer named. Hooks on a model and its optimizer name each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def held(device: torch.device) -> int:
    """Bytes of all tensors on the device; 0 on a CPU, which does not count."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


class Runner:
    """A network with its optimizer, which takes steps on one batch under autocast to bfloat16."""

    def __init__(self, network: Network, contender: Contender, size: int, device: torch.device, seed: int):
        self.device = device
        self.model = network.made(device, seed)
        self.model.train()
        before = held(device)
        self.optimizer = contender.build(self.model)
        self.built = held(device) - before
        self.x, self.y = network.data(size, device, seed)

    model: nn.Module
    optimizer: Optimizer

    def passes(self) -> Tensor:
        """The gradients of one step; returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = cross_entropy(self.model(self.x).flatten(0, -2), self.y.flatten())
        loss.backward()
        return loss.detach()

    def update(self, loss: Tensor) -> None:
        """The optimizer's part of the step."""
        if isinstance(self.optimizer, natgrad.NLCG):
            self.optimizer.step(loss=loss)
        else:
            self.optimizer.step()

    def step(self) -> Taken:
        """One step."""
        begin = mark(self.device)
        loss = self.passes()
        before = mark(self.device)
        self.update(loss)
        return Taken(begin, before, mark(self.device), loss)

    def state_bytes(self) -> int:
        """Bytes of the optimizer's tensors."""
        tensors = [v for own in self.optimizer.state.values() for v in own.values() if isinstance(v, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


class Taken(NamedTuple):
    """A step: when it began, when the optimizer's part did, when it ended; the loss before it."""

    begin: Mark
    before: Mark
    end: Mark
    loss: Tensor


@dataclass(frozen=True)
class Block:
    """Some steps in a row: means of their milliseconds on the device and on the host, whole and within `step()`."""

    ms: float
    host_ms: float
    inside_ms: float
    inside_host_ms: float
    each: list[float]
    losses: list[float]


def block(runner: Runner, steps: int) -> Block:
    """Take some steps. The device is idle at the start, and is waited for at the end."""
    wait(runner.device)
    taken = [runner.step() for _ in range(steps)]
    wait(runner.device)
    ends = [*(one.begin for one in taken[1:]), taken[-1].end]
    each = [one.begin.until(end) for one, end in zip(taken, ends)]
    return Block(
        ms=sum(each) / steps,
        host_ms=1e3 * (taken[-1].end.clock - taken[0].begin.clock) / steps,
        inside_ms=statistics.fmean(one.before.until(one.end) for one in taken),
        inside_host_ms=statistics.fmean(1e3 * (one.end.clock - one.before.clock) for one in taken),
        each=each,
        losses=[float(one.loss) for one in taken],
    )


@dataclass(frozen=True)
class Effort:
    """How much is measured: rounds at most, steps in a block, and whether to warm up in full."""

    rounds: int
    steps: int
    warm: bool = True


def figures(
    network: Network,
    contender: Contender,
    size: int,
    device: torch.device,
    effort: Effort,
    seed: int,
    deadline: float,
    end: float,
) -> dict[str, Any]:
    """A contender's row. At least `FEWEST` rounds are taken beyond `deadline`, but none beyond `end`.

    Raises:
        OutOfTimeError: before `FEWEST` rounds were taken.

    """
    free(device)
    base = Runner(network, SGD, size, device, seed)
    block(base, 2)
    base.optimizer.zero_grad(set_to_none=True)
    resident = held(device)
    own = Runner(network, contender, size, device, seed)
    losses: list[float] = []
    for _ in range(contender.warm if effort.warm else 2):
        losses += block(own, 1).losses
        in_time(end)
    settled, peak = held(device), 0
    pairs: list[tuple[Block, Block]] = []
    fewest = min(FEWEST, effort.rounds)
    while len(pairs) < effort.rounds and (len(pairs) < fewest or time.monotonic() < deadline):
        first = block(base, effort.steps)
        base.optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        second = block(own, effort.steps)
        peak = max(peak, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)
        losses += second.losses
        pairs.append((first, second))
        in_time(end)
    grown = held(device) - settled
    row = summary(pairs, losses) | {"state_bytes": own.state_bytes()}
    if device.type == "cuda":
        loss = own.passes()
        row["waits"] = waits_of(lambda: own.update(loss))
        row |= {"built_bytes": own.built, "peak_bytes": peak - resident, "grown_bytes": grown}
    if hasattr(own.optimizer, "coverage"):
        row["curvature_share"] = round(own.optimizer.coverage().share, 4)  # type: ignore[attr-defined]
    return row


def waits_of(call: Callable[[], Any]) -> int:
    """How often the host waits for the GPU within a call, by torch's own count.

    It has every copy that the host waits for, to the device as well as from it.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def in_time(end: float) -> None:
    if time.monotonic() > end:
        raise OutOfTimeError


def summary(pairs: list[tuple[Block, Block]], losses: list[float]) -> dict[str, Any]:
    """Medians over rounds; of ratios and milliseconds also the quartiles, and the longest step of all."""
    own = [second for _, second in pairs]
    ratios = [second.ms / first.ms for first, second in pairs]
    inside = [second.inside_ms for second in own]
    return {
        "rounds": len(pairs),
        "ms": middle([one.ms for one in own]),
        "ms_quartiles": quartiles([one.ms for one in own]),
        "sgd_ms": middle([first.ms for first, _ in pairs]),
        "ratio": middle(ratios),
        "ratio_quartiles": quartiles(ratios),
        "host_ms": middle([one.host_ms for one in own]),
        "host_ratio": middle([second.host_ms / first.host_ms for first, second in pairs]),
        "inside_ms": middle(inside),
        "inside_host_ms": middle([one.inside_host_ms for one in own]),
        "longest_ms": round(max(ms for one in own for ms in one.each), 3),
        "loss_first": losses[0],
        "loss_last": statistics.fmean(losses[-len(own[-1].losses) :]),
        "finite": all(math.isfinite(loss) for loss in losses),
    }


def middle(values: list[float]) -> float:
    return round(statistics.median(values), 3)


def quartiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return [round(values[0], 3)] * 2
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [round(low, 3), round(high, 3)]


def out_of_memory(error: BaseException) -> bool:
    """Whether a failure says that the device's memory is full; libraries have words of their own."""
    told = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in told for words in ("out of memory", "ALLOC_FAILED", "NOT_INITIALIZED when calling `cublasCreate")
    )


def smaller(size: int, attempt: Callable[[int], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """A row at this batch, or at half of it and so on where memory does not last."""
    tried = []
    while True:
        free(device)
        try:
            row = attempt(size)
            return {**row, "batch": size, **({"too_large": tried} if tried else {})}
        except RuntimeError as error:
            if not out_of_memory(error) or size == 1:
                raise
        tried.append(size)  # after `except`: the failure no longer holds the frames, nor they the memory
        size //= 2
