"""Who makes the trials: this process, with all its ranks, or several processes that make one trial each at a time."""

import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait as wait_for
from typing import Any, Protocol

import torch

from natgrad.parallel import World
from natgrad_lab.compare.cell import Cell, Outcome
from natgrad_lab.compare.tasks import Task
from natgrad_lab.compare.trials import Trial, learning, run_trial
from natgrad_lab.data import Splits
from natgrad_lab.train.malloc import keep_freed_memory
from natgrad_lab.train.run import pick_device
from natgrad_lab.train.stop import Stop


@dataclass
class TrialBench:
    """Where trials are made: the data, read once, and the ranks."""

    task: Task
    device: str
    world: World

    @cached_property
    def splits(self) -> Splits:
        """All data, on the device."""
        return self.task.recipe.data.load().to(pick_device(self.device, self.world))

    @cached_property
    def tuning(self) -> Splits:
        """The training samples, a part of them held out."""
        return learning(self.task, self.splits, final=False)

    @cached_property
    def finals(self) -> Splits:
        """All training samples, and the test's."""
        return learning(self.task, self.splits, final=True)

    def make(self, trial: Trial, stop: Callable[[], bool]) -> Any:
        """Make a trial; None where stopped."""
        splits = self.finals if trial.final else self.tuning
        return run_trial(trial, self.task, splits, self.world, stop, lambda step: None)


Done = Callable[[Outcome], None]


class Maker(Protocol):
    """Makes trials, sooner or later."""

    def submit(self, trial: Trial) -> "Future[Any]": ...

    def close(self) -> None: ...


class Here:
    """Makes each trial at once, in this process; all ranks do the same."""

    def __init__(self, bench: TrialBench, stop: Stop) -> None:
        self.bench, self.stop = bench, stop

    def submit(self, trial: Trial) -> "Future[Any]":
        done: Future[Any] = Future()
        done.set_result(self.bench.make(trial, self.stop))
        return done

    def close(self) -> None:
        """Nothing is left over."""


class Workers:
    """Makes trials in processes of their own; they end with this one, however it ends."""

    def __init__(self, task: Task, device: str, count: int) -> None:
        context = get_context("spawn")
        self.stopping = context.Event()
        threads = max(1, (os.cpu_count() or 1) // count)
        given = (task, device, threads, self.stopping)
        self.pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=given)

    def submit(self, trial: Trial) -> "Future[Any]":
        return self.pool.submit(_make, trial)

    def close(self) -> None:
        self.stopping.set()
        self.pool.shutdown(wait=True, cancel_futures=True)


_here: list[Any] = []


def _begin(task: Task, device: str, threads: int, stopping: Any) -> None:
    """Make a worker ready. Ctrl-C reaches it, too, but it is the parent's to say when it stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    torch.set_num_threads(threads)
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    _here[:] = [TrialBench(task, device, World()), stopping]


def _end_with(sentinel: Any) -> None:
    wait_for([sentinel])
    os._exit(1)


def _make(trial: Trial) -> Any:
    bench, stopping = _here
    return bench.make(trial, stopping.is_set)


class Interrupted(Exception):  # noqa: N818
    """A trial was stopped; on several ranks, on all of them at once."""


def drive(cells: list[Cell], make: Callable[[Any], "Future[Any]"], stop: Callable[[], bool], done: Done) -> bool:
    """Make all that cells ask for, damping_tolerance of each cell that is done; False where stopped.

    make: returns a future of what a cell has asked for, a trial's result or whether a contender is far behind. Every
    cell has its next trials under way at once; `make` may take them one after the other.
    """
    driver = Driver(cells, make, done)
    try:
        for place in range(len(cells)):
            driver.go_on(place, None)
            while (settled := [future for future in driver.asked if future.done()]) and not stop():
                driver.take(settled)
        while driver.asked and not stop():
            driver.take(wait(driver.asked, timeout=0.5, return_when=FIRST_COMPLETED).done)
    except Interrupted:
        return False
    except BrokenProcessPool:
        raise ValueError(
            "a worker was killed, perhaps for want of memory; the same command, with fewer --workers, goes on"
        ) from None
    return not driver.asked


class Driver:
    """Hands trials' results to the cells that asked for them."""

    def __init__(self, cells: list[Cell], make: Callable[[Any], "Future[Any]"], done: Done) -> None:
        self.cells, self.make, self.done = cells, make, done
        self.asked: dict[Future[Any], tuple[int, int]] = {}
        self.results: list[list[Any]] = [[] for _ in cells]

    def go_on(self, place: int, sent: list[Any] | None) -> None:
        """Send a cell what it asked for, and have made what it asks for next."""
        try:
            trials = next(self.cells[place]) if sent is None else self.cells[place].send(sent)
        except StopIteration as finished:
            self.done(finished.value)
            return
        self.results[place] = [None] * len(trials)
        for position, trial in enumerate(trials):
            future = self.make(trial)
            if future.done() and future.result() is None:
                raise Interrupted
            self.asked[future] = place, position

    def take(self, settled: Iterable["Future[Any]"]) -> None:
        """Hand over results; a cell that has all it asked for goes on."""
        for future in settled:
            place, position = self.asked.pop(future)
            if (result := future.result()) is None:
                raise Interrupted
            self.results[place][position] = result
            if all(known is not None for known in self.results[place]):
                self.go_on(place, self.results[place])
