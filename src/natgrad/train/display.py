"""What a run shows on the screen."""

from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from natgrad.train.evaluate import Score
from natgrad.train.loop import Step


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

    def record(self, step: Step, memory: int | None) -> None:
        """Show what is known after a step."""
        self.step(step.step, step.loss)

    def judged(self, step: Step, score: Score) -> None:
        """Show how good the model is."""
        self.say(
            f"step {step.step}/{self.steps}  epoch {step.epoch:.1f}  loss {step.loss:.4f}  "
            f"test accuracy {score.accuracy:.4f}  test loss {score.loss:.4f}  {step.elapsed:.1f} s"
        )

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Show what else happened, in a line."""
        told = ", ".join(f"{name} {value}" for name, value in values.items())
        self.say(f"step {step}/{self.steps}  {kind.replace('_', ' ')}{': ' if told else ''}{told}")

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text)

    def end(self, status: str, summary: dict[str, Any], folder: Path | None, resume: str | None) -> None:
        """Take the bar away and say how the run ended."""
        self.close()
        where = f" in {folder}" if folder is not None else ""
        self.say(f"{status} after {summary.get('steps', 0)} steps: summary.json, metrics.jsonl{where}")
        if resume is not None:
            self.say(f"go on with: {resume}")

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()
