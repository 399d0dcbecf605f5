"""A run's folder and what is told while it runs; both on rank 0 only.

recipe.json     every field, versions, machine, commit, seed, and how often it was started, and where: written first
metrics.jsonl   one line a step, an evaluation and an event, each complete as soon as it is written
summary.json    how it ended: finished, interrupted or failed; there is none while a run goes on, or was killed
"""

import json
import math
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from natgrad_lab.train.disk import naming
from natgrad_lab.train.display import Display
from natgrad_lab.train.environment import peak_memory
from natgrad_lab.train.evaluate import Score
from natgrad_lab.train.loop import Step
from natgrad_lab.train.tensorboard import FOLDER, Board
from natgrad_lab.train.warn import listeners

LOCK = ".lock"
"""Held by the run that writes to a folder; left by one that was killed."""


def check_free(folder: Path, overwrite: bool, stopped: bool = False) -> None:
    """Refuse to write where another run is, unless told to. stopped: that run can go on from a checkpoint."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {str(folder)!r} is a file; name a folder")
    if folder.is_dir() and any(entry.name != LOCK for entry in folder.iterdir()) and not overwrite:
        what = "holds a run that was stopped; add --resume to go on with it," if stopped else "is not empty; add"
        raise ValueError(f"--out {str(folder)!r} {what} --overwrite to replace it, or name another folder")


def write_json(path: Path, value: Any) -> None:
    """Write a file in one go: a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with naming(path):
        part.write_text(json.dumps(value, indent=2) + "\n")
        part.replace(path)


def forget(folder: Path, *names: str) -> None:
    """Delete files of an earlier run, and nothing else that may lie beside them."""
    for name in names:
        for path in folder.glob(name):
            path.unlink()


class RunFolder:
    """Writes a run's three files, or goes on with those of a run that is taken up after step `resume_at`.

    Then lines of later steps, and a half line that a crash has left, are dropped; the recipe stays as it was first
    written, and gets one more of its `starts`. `elapsed` is the seconds of training that the kept lines tell of, `told`
    what a summary would have said after them.
    """

    def __init__(
        self, folder: Path, about: dict[str, Any], overwrite: bool = False, resume_at: int | None = None
    ) -> None:
        self.folder, self.resume_at, self.elapsed = folder, resume_at, 0.0
        self.told: dict[str, Any] = {}
        if resume_at is None:
            check_free(folder, overwrite)
        starts = [_start(about, resume_at or 0)]
        if resume_at is not None:
            kept = _read_recipe(folder)
            changed = {key: value for key, value in about.items() if key != "machine" and kept.get(key) != value}
            starts = [*kept.get("starts", []), {**starts[0], **({"changed": changed} if changed else {})}]
            about = kept
            self.told = cut(folder / "metrics.jsonl", resume_at)
            self.elapsed = self.told.get("seconds", 0.0)
        else:
            forget(folder, f"{FOLDER}/*/events.out.tfevents.*")
        forget(folder, "summary.json", "report.html")
        write_json(folder / "recipe.json", {**about, "starts": starts})
        mode = "wb" if resume_at is None else "ab"
        self._metrics: BinaryIO = (folder / "metrics.jsonl").open(mode, buffering=0)  # pyright: ignore[reportAttributeAccessIssue]
        self._lost = False

    def line(self, kind: str, **values: Any) -> None:
        """Append one complete line. A full disk costs lines, and a warning, but not the run."""
        try:
            self._metrics.write((plain({"kind": kind, **values}) + "\n").encode())
        except OSError as error:
            if not self._lost:
                warnings.warn(f"metrics.jsonl cannot be written ({error.strerror}): lines are missing", stacklevel=2)
            self._lost = True

    def close(self, status: str, **values: Any) -> None:
        """Say how the run ended."""
        self._metrics.close()
        try:
            write_json(self.folder / "summary.json", {"status": status, **finite(values)})
        except OSError as error:  # it must not hide what has ended the run
            warnings.warn(f"summary.json cannot be written ({error.strerror})", stacklevel=2)


def _start(about: dict[str, Any], step: int) -> dict[str, Any]:
    """Return what is worth knowing of one start; host and pid tell a reader whether it still runs."""
    return {"step": step, "host": socket.gethostname(), "pid": os.getpid(), "machine": about.get("machine", {})}


def _read_recipe(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "recipe.json").read_text())
    except (OSError, ValueError):
        raise ValueError(f"{str(folder)!r} has no readable recipe.json, so no run can be resumed there") from None


TOLD = {
    "step": {"step": "steps", "elapsed": "seconds", "loss": "loss", "memory": "memory", "skipped": "skipped"},
    "evaluation": {"elapsed": "seconds", "test_accuracy": "test_accuracy", "test_loss": "test_loss"},
    "bad_images": {"count": "bad_images"},
}
"""What of a line is in the summary, by the line's kind, and its name there."""


def cut(path: Path, last: int) -> dict[str, Any]:
    """Drop the lines of steps after `last`, and what is no line; return what the kept ones have for a summary."""
    told: dict[str, Any] = {}
    part = path.with_name(path.name + ".part")
    with part.open("wb") as out:
        for text, line in whole_lines(path):
            if line.get("step", 0) <= last:
                out.write(text)
                told |= {new: line[old] for old, new in TOLD.get(line.get("kind", ""), {}).items() if old in line}
    part.replace(path)
    return told


def whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the lines of a metrics file that can be read, as they are and as values; none if there is no file."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        for text in lines:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and text.endswith(b"\n"):
                yield text, line


def plain(values: dict[str, Any]) -> str:
    """Return values as one line of JSON that any reader takes: null for what JSON has no number for."""
    try:
        return json.dumps(values, allow_nan=False)
    except ValueError:
        return json.dumps(finite(values))


def finite(value: Any) -> Any:
    """Replace NaN and infinities within plain values by None."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Journal:
    """What becomes of a run's news: written to a folder, shown on a display, where there are such."""

    def __init__(
        self, folder: RunFolder | None = None, display: Display | None = None, tensorboard: bool = False
    ) -> None:
        self.folder, self.display = folder, display
        self.board = Board(folder.folder, folder.resume_at) if folder is not None and tensorboard else None
        self.summary: dict[str, Any] = {} if folder is None else dict(folder.told)
        if folder is not None:
            listeners.add(self)

    def warned(self, text: str) -> None:
        """Record a warning."""
        if self.folder is not None:
            self.folder.line("warning", step=self.summary.get("steps", 0), text=text)

    def step(self, step: Step) -> None:
        """Record a step, and the most memory that this rank has held so far."""
        memory = peak_memory()
        self.summary.update(steps=step.step, seconds=step.elapsed, loss=step.loss, memory=memory, **_skipped(step))
        if self.folder is not None:
            values = {name: value for name, value in vars(step).items() if name not in ("second_order", "stop")}
            self.folder.line("step", **values, memory=memory, **step.second_order)
        if self.display is not None:
            self.display.record(step, memory)
        if self.board is not None:
            self.board.step(step, memory)

    def evaluation(self, step: Step, score: Score) -> None:
        """Record how good the model is on the test images after a step."""
        self.judged("test", score)
        if self.folder is not None:
            values = {"step": step.step, "epoch": step.epoch, "elapsed": step.elapsed}
            self.folder.line("evaluation", **values, test_accuracy=score.accuracy, test_loss=score.loss)
        if self.display is not None:
            self.display.judged(step, score)
        if self.board is not None:
            self.board.evaluation(step, score)

    def event(self, kind: str, **values: Any) -> None:
        """Record anything else that happened, after the last step unless `step` says otherwise; show it as a line."""
        values = {"step": self.summary.get("steps", 0), **values}
        if self.folder is not None:
            self.folder.line(kind, **values)
        if self.display is not None:
            self.display.event(kind, **values)

    def judging(self, share: float) -> None:
        """Show that the model is being judged."""
        if self.display is not None:
            self.display.judging(share)

    def judged(self, split: str, score: Score) -> None:
        """Keep a score for the summary."""
        if self.display is not None:
            self.display.figures.judging = None
        self.summary[f"{split}_accuracy"], self.summary[f"{split}_loss"] = score.accuracy, score.loss

    def close(self, status: str, resume: str | None = None) -> None:
        """Say how the run ended, in the folder and to whoever watches; `resume` is the command that takes it up."""
        if self.display is not None:
            self.display.end(status, self.summary, self.folder.folder if self.folder is not None else None, resume)
        if self.board is not None:
            self.board.close()
        if self.folder is not None:
            listeners.discard(self)
            self.folder.close(status, **self.summary, **({"resume": resume} if resume else {}))


def _skipped(step: Step) -> dict[str, int]:
    return {"skipped": step.second_order["skipped"]} if "skipped" in step.second_order else {}
