"""Reading ahead: worker processes of torch's DataLoader work off indices in the order in which they will be asked for.

Workers come from a fork server, which is started before it has threads: a fork of a process that has run torch
or gloo may inherit a lock that nobody will release. It has imported torch, so a worker starts in some milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

PIECE = 64
"""Items that a worker makes at a time: small beside a batch, so that all workers have their part of it."""
DEPTH = 1024
"""Items that are read ahead at least: 200 MB of 256x256 images."""


class Prefetcher:
    """What `dataset.__getitems__` makes of the pieces of each index, made by workers before it is asked for.

    The workers end when nothing refers to this object any more; so nothing that it refers to may refer to it.
    """

    def __init__(self, dataset: Dataset, indices: Iterable[Tensor], workers: int, pin: bool = False) -> None:
        self.coming: deque[Tensor] = deque()
        loader: Any = DataLoader(
            dataset,
            batch_sampler=_pieces(indices, self.coming),
            num_workers=workers,
            prefetch_factor=max(2, -(-DEPTH // (PIECE * workers))),
            collate_fn=_as_it_is,
            multiprocessing_context=_context(),
            worker_init_fn=_begin,
            pin_memory=pin,
            generator=torch.Generator(),  # else the workers' seed is drawn from the run's random numbers
        )
        self.made = iter(loader)

    def read(self, index: Tensor) -> list[Any] | None:
        """Return what was made of an index's pieces; None where it is not the one that was to come next."""
        if not self.coming or not torch.equal(self.coming[0], index):
            return None
        try:
            made = [next(self.made) for _ in index.split(PIECE)]
        except (RuntimeError, OSError, EOFError) as error:  # killed, by a scheduler's signal or for their memory
            self.coming.clear()
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            warnings.warn(f"workers have died, images are no longer read ahead ({why})", stacklevel=2)
            return None
        self.coming.popleft()
        return made


def _pieces(indices: Iterable[Tensor], begun: deque[Tensor]) -> Iterator[list[int]]:
    """Yield the pieces of each index, putting those that are begun in a queue."""
    for index in indices:
        begun.append(index)
        yield from (piece.tolist() for piece in index.split(PIECE))


def cores() -> int:
    """How many of the machine's cores are this rank's part."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, there // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _context() -> Any:
    """Return the way in which workers are started: from a server that is forked from nothing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["natgrad_lab.data.pictures", "datasets", "PIL.Image"])
    return context


def _begin(worker: int) -> None:
    """Let a worker end with its rank however that dies, and leave an interrupt to the rank, which ends its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(0)), daemon=True).start()


def _as_it_is(made: Any) -> Any:
    return made
