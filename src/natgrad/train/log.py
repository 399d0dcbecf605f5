"""A run's folder and what is shown while it runs; both on rank 0 only.

recipe.json     every field, versions, machine, commit, seed: written first
metrics.jsonl   one line a step and one an evaluation, each complete as soon as it is written
summary.json    how it ended: finished, interrupted or failed
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from natgrad.train.evaluate import Score
from natgrad.train.loop import Step


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuse to write where another run is, unless told to."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {str(folder)!r} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"--out {str(folder)!r} is not empty; add --overwrite to replace it, or name another folder")


def write_json(path: Path, value: Any) -> None:
    """Write a file in one go: a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    part.replace(path)


def forget(folder: Path, *names: str) -> None:
    """Delete files of an earlier run, and nothing else that may lie beside them."""
    for name in names:
        for path in folder.glob(name):
            path.unlink()


class RunFolder:
    """Writes a run's three files."""

    def __init__(self, folder: Path, recipe: dict[str, Any], overwrite: bool = False) -> None:
        check_free(folder, overwrite)
        self.folder = folder
        forget(folder, "summary.json", "report.html")
        write_json(folder / "recipe.json", recipe)
        self._metrics: TextIO = (folder / "metrics.jsonl").open("w")

    def line(self, kind: str, **values: Any) -> None:
        """Append one complete line."""
        self._metrics.write(json.dumps({"kind": kind, **values}) + "\n")
        self._metrics.flush()

    def close(self, status: str, **values: Any) -> None:
        """Say how the run ended."""
        self._metrics.close()
        write_json(self.folder / "summary.json", {"status": status, **values})


class Display:
    """A bar where someone is watching, a line at each evaluation where the output goes to a file."""

    def __init__(self, title: str, steps: int, stream: TextIO | None = None) -> None:
        self.console = Console(file=stream, highlight=False, soft_wrap=True)
        self.steps = steps
        self.bar: Progress | None = None
        if self.console.is_terminal:
            columns = (
                TextColumn(title),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)
            self.bar.start()
            self.task = self.bar.add_task(title, total=steps, note="")

    def step(self, step: int, loss: float) -> None:
        """Show that a step is done."""
        if self.bar is not None:
            self.bar.update(self.task, completed=step, note=f"loss {loss:.4f}")

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()


class Journal:
    """What becomes of a run's news: written to a folder, shown on a display, where there are such."""

    def __init__(self, folder: RunFolder | None = None, display: Display | None = None) -> None:
        self.folder, self.display = folder, display
        self.summary: dict[str, Any] = {}

    def step(self, step: Step) -> None:
        """Record a step."""
        self.summary.update(steps=step.step, seconds=step.elapsed, loss=step.loss, **_skipped(step))
        if self.folder is not None:
            values = asdict(step)
            values.pop("stop")
            second_order = values.pop("second_order")
            self.folder.line("step", **values, **second_order)
        if self.display is not None:
            self.display.step(step.step, step.loss)

    def evaluation(self, step: Step, score: Score) -> None:
        """Record how good the model is on the test images after a step."""
        self.judged("test", score)
        if self.folder is not None:
            values = {"step": step.step, "epoch": step.epoch, "elapsed": step.elapsed}
            self.folder.line("evaluation", **values, test_accuracy=score.accuracy, test_loss=score.loss)
        if self.display is not None:
            self.display.say(
                f"step {step.step}/{self.display.steps}  epoch {step.epoch:.1f}  loss {step.loss:.4f}  "
                f"test accuracy {score.accuracy:.4f}  test loss {score.loss:.4f}  {step.elapsed:.1f} s"
            )

    def judged(self, split: str, score: Score) -> None:
        """Keep a score for the summary."""
        self.summary[f"{split}_accuracy"], self.summary[f"{split}_loss"] = score.accuracy, score.loss

    def close(self, status: str) -> None:
        """Say how the run ended, in the folder and to whoever watches."""
        if self.display is not None:
            self.display.close()
            where = f" in {self.folder.folder}" if self.folder is not None else ""
            self.display.say(f"{status} after {self.summary.get('steps', 0)} steps: summary.json, metrics.jsonl{where}")
        if self.folder is not None:
            self.folder.close(status, **self.summary)


def _skipped(step: Step) -> dict[str, int]:
    return {"skipped": step.second_order["skipped"]} if "skipped" in step.second_order else {}
