"""When checkpoints are written, and which stay: begun after a step, written in the background, found when whole.

What travels: after a save has begun, two numbers with every step, until every rank has written its part.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from natgrad.parallel import TIMEOUT, World, local_of, named, whole_of
from natgrad_lab.train import checkpoint
from natgrad_lab.train.disk import reason_of
from natgrad_lab.train.loop import Job
from natgrad_lab.train.state import state_of

Tell = Callable[..., None]
"""Called with a kind and values for the record of the run, on rank 0."""


class Saver:
    """Writes checkpoints of a job into a folder, one at a time, and keeps the last few. All ranks call it alike.

    patience: seconds for which all wait for a disk; a checkpoint that is not written by then is given up.
    """

    def __init__(self, folder: Path, world: World, keep: int, tell: Tell, patience: float = TIMEOUT) -> None:
        self.folder, self.world, self.keep, self.tell, self.patience = folder, world, keep, tell, patience
        self.given_up: Future[Any] | None = None
        """What this rank's disk was too slow for, and may still be at."""
        self.writing: tuple[int, Future[None]] | None = None
        self.joining: tuple[int, Future[Path]] | None = None
        self.values: dict[str, Any] = {}
        if world.rank == 0:
            for left in [*folder.glob("step-*.part"), *folder.glob("step-*.old")]:  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)

    def save(self, job: Job) -> None:
        """Copy the job as it is and begin to write it. Weights that are not finite are not worth keeping."""
        self.finish()
        if self._still_slow():
            self.tell("not_saved", step=job.done, reason="the disk is still at an earlier checkpoint")
            return
        lost = torch.tensor([float(not all(bool(torch.isfinite(local_of(p)).all()) for p in job.model.parameters()))])
        self.world.max([lost], "scalars")  # ranks may hold different parts
        if lost.item():
            self.tell("not_saved", step=job.done, reason="a weight is not finite")
            return
        tensors, values = state_of(job)
        staged = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self.values = {"step": job.done, "elapsed": job.elapsed, **values}
        part = self.part(job.done)
        self.writing = job.done, begun(checkpoint.write_part, part, self.world.rank, staged)

    def _still_slow(self) -> bool:
        """Whether any rank's disk is still at what was given up."""
        if self.given_up is not None and self.given_up.done():
            self.given_up = None
        slow = torch.tensor([float(self.given_up is not None)])
        self.world.max([slow], "scalars")
        return slow.item() > 0

    def part(self, step: int) -> Path:
        """Where a checkpoint is until it is whole."""
        return self.folder / f"{checkpoint.name_of(step)}.part"

    def poll(self, block: bool = False) -> None:
        """See whether all ranks have written; if so, rank 0 joins the parts. `block`: wait for it."""
        if self.writing is not None:
            step, own = self.writing
            if block:
                wait([own], self.patience)
            written = own.done()
            failed = written and own.exception() is not None
            news = torch.tensor([float(written), float(failed)])
            self.world.sum([news], "scalars")
            done, failures = news.tolist()
            if done == self.world.size:
                self.writing = None
                self._settle(step, own, int(failures))
            elif block:
                self._give_up(step, own, late=not written)
        if self.joining is not None and (block or self.joining[1].done()):
            (step, joined), self.joining = self.joining, None
            wait([joined], self.patience)
            if not joined.done():
                self.given_up = joined
                self.tell("not_saved", step=step, reason=f"the disk of rank 0 was not done in {self.patience:g} s")
                return
            error = joined.exception()
            if error is None:
                self.tell("checkpoint", step=step, path=str(joined.result()))
            else:
                self._failed(step, reason_of(error, self.part(step)))

    def _give_up(self, step: int, own: Future[None], late: bool) -> None:
        """Some ranks have not written in time. What they are at is left to itself, and they are named."""
        self.writing, self.given_up = None, own if late else None
        everyone = torch.zeros(self.world.size)
        everyone[self.world.rank] = float(late)
        self.world.sum([everyone], "scalars")
        ranks = named(torch.nonzero(everyone).flatten().tolist())
        self.tell("not_saved", step=step, reason=f"the disk of {ranks} was not done in {self.patience:g} s (--timeout)")

    def _settle(self, step: int, own: Future[None], failures: int) -> None:
        """All ranks have written, or could not."""
        if self.world.rank == 0 and not failures:
            self.joining = step, begun(self._join, step, dict(self.values))
        elif failures:
            error, others = own.exception(), f"{failures} other ranks could not write"
            self._failed(step, reason_of(error, self.part(step)) if error else others)

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


def begun(work: Callable[..., Any], *given: Any) -> Future[Any]:
    """Work in the background, in a thread that a process which ends does not wait for: its disk may hang."""
    found: Future[Any] = Future()

    def run() -> None:
        try:
            found.set_result(work(*given))
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return found


def write_weights(job: Job, file: Path, patience: float = TIMEOUT) -> None:
    """Write the weights, as the model was judged by, for torch.load; ValueError where they cannot be written.

    All ranks call it: of a model that is cut over ranks rank 0 gets one tensor after the other.
    """
    with job.average.in_place():
        state = job.model.state_dict()
        weights = {name: gathered(value, job.world) for name, value in state.items()}
        if job.world.rank:
            return
        part = file.with_name(file.name + ".part")

        def write() -> None:
            with part.open("wb") as stream:
                torch.save(weights, stream)
                checkpoint.flush(stream)
            part.replace(file)

        writing = begun(write)
        wait([writing], patience)
        if not writing.done():
            raise ValueError(
                f"{str(file)!r} was not written in {patience:g} s: see to the disk, and add --resume to end, or a "
                "longer --timeout"
            )
        error = writing.exception()
        if error is not None:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise ValueError(f"{reason_of(error, file)}, and add --resume to end") from None


def gathered(value: Any, world: World) -> Any:
    """What stands in a network's state, on rank 0 and on the host; tensors of other ranks are dropped."""
    if not isinstance(value, torch.Tensor):
        return value
    whole = whole_of(value)
    return whole.cpu() if world.rank == 0 else None
