"""When checkpoints are written, and which stay: begun after a step, written in the background, found when whole.

What travels: after a save has begun, two numbers with every step, until every rank has written its part.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from natgrad.parallel import World
from natgrad_lab.train import checkpoint
from natgrad_lab.train.loop import Job
from natgrad_lab.train.state import state_of

Tell = Callable[..., None]
"""Called with a kind and values for the record of the run, on rank 0."""


class Saver:
    """Writes checkpoints of a job into a folder, one at a time, and keeps the last few. All ranks call it alike."""

    def __init__(self, folder: Path, world: World, keep: int, tell: Tell) -> None:
        self.folder, self.world, self.keep, self.tell = folder, world, keep, tell
        self.pool = ThreadPoolExecutor(1)
        self.writing: tuple[int, Future[None]] | None = None
        self.joining: tuple[int, Future[Path]] | None = None
        self.values: dict[str, Any] = {}
        if world.rank == 0:
            for left in [*folder.glob("step-*.part"), *folder.glob("step-*.old")]:  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)

    def save(self, job: Job) -> None:
        """Copy the job as it is and begin to write it. Weights that are not finite are not worth keeping."""
        self.finish()
        if not all(bool(torch.isfinite(p).all()) for p in job.model.parameters()):
            self.tell("not_saved", step=job.done, reason="a weight is not finite")
            return
        tensors, values = state_of(job)
        staged = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self.values = {"step": job.done, "elapsed": job.elapsed, **values}
        part = self.part(job.done)
        self.writing = job.done, self.pool.submit(checkpoint.write_part, part, self.world.rank, staged)

    def part(self, step: int) -> Path:
        """Where a checkpoint is until it is whole."""
        return self.folder / f"{checkpoint.name_of(step)}.part"

    def poll(self, block: bool = False) -> None:
        """See whether all ranks have written; if so, rank 0 joins the parts. `block`: wait for it."""
        if self.writing is not None:
            step, own = self.writing
            if block:
                wait([own])
            failed = own.done() and own.exception() is not None
            news = torch.tensor([float(own.done()), float(failed)])
            self.world.sum([news], "scalars")
            done, failures = news.tolist()
            if done == self.world.size:
                self.writing = None
                self._settle(step, own, int(failures))
        if self.joining is not None and (block or self.joining[1].done()):
            (step, joined), self.joining = self.joining, None
            error = joined.exception()
            if error is None:
                self.tell("checkpoint", step=step, path=str(joined.result()))
            else:
                self._failed(step, reason_of(error))

    def _settle(self, step: int, own: Future[None], failures: int) -> None:
        """All ranks have written, or could not."""
        if self.world.rank == 0 and not failures:
            self.joining = step, self.pool.submit(self._join, step, dict(self.values))
        elif failures:
            error = own.exception()
            self._failed(step, reason_of(error) if error else f"{failures} other ranks could not write")

    def _join(self, step: int, values: dict[str, Any]) -> Path:
        ranks = range(self.world.size)
        missing = [rank for rank in ranks if not (self.part(step) / f"rank-{rank}/.metadata").exists()]
        if missing:
            told = ", ".join(map(str, missing[:8]))
            raise ValueError(f"parts of ranks {told} are not there: --out must be a folder that all hosts share")
        whole = checkpoint.commit(self.part(step), self.world.size, values)
        for old in checkpoint.found(self.folder)[: -self.keep]:
            doomed = self.folder / f"{checkpoint.name_of(old)}.old"
            with suppress(OSError):  # one too many is not worth a word
                shutil.rmtree(doomed, ignore_errors=True)
                (self.folder / checkpoint.name_of(old)).rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
        return whole

    def _failed(self, step: int, reason: str) -> None:
        """Leave nothing of a checkpoint that could not be written; those before it are untouched."""
        if self.world.rank == 0:
            shutil.rmtree(self.part(step), ignore_errors=True)
            last = self.last()
            self.tell("not_saved", step=step, reason=reason, **({} if last is None else {"last": str(last)}))

    def last(self) -> Path | None:
        """The newest whole checkpoint."""
        steps = checkpoint.found(self.folder)
        return self.folder / checkpoint.name_of(steps[-1]) if steps else None

    def finish(self) -> None:
        """Wait until nothing is under way."""
        while self.writing is not None or self.joining is not None:
            self.poll(block=True)


def write_weights(job: Job, file: Path) -> None:
    """Write the weights, as the model was judged by, for torch.load; ValueError where they cannot be written."""
    with job.average.in_place():
        state = job.model.state_dict()
        weights = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
        part = file.with_name(file.name + ".part")
        try:
            with part.open("wb") as stream:
                torch.save(weights, stream)
                checkpoint.flush(stream)
            part.replace(file)
        except (OSError, RuntimeError) as error:
            part.unlink(missing_ok=True)
            why = reason_of(error)
            raise ValueError(f"{str(file)!r} cannot be written: {why}; make room, and add --resume to end") from None


def reason_of(error: BaseException) -> str:
    """Why a file could not be written, in a few words: the system's, wherever among the causes it is."""
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno is not None:
            return os.strerror(cause.errno)
    return " ".join(str(error).split())[:200]


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what it came of, and what torch has packed into it."""
    while error is not None:
        yield error
        for packed in getattr(error, "failures", {}).values():
            yield from causes(packed[0])
        error = error.__cause__ or error.__context__
