"""What a run shows: a panel of a few lines where someone is watching, lines where the output goes to a file.

The panel is drawn by the training thread, at most eight times a second and never for more than half a percent of
its time, and once a second beside it, so that a long step is seen to go on.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from natgrad_lab.report.number_format import duration, number
from natgrad_lab.train.evaluate import Score
from natgrad_lab.train.figures import Figures, Row, head
from natgrad_lab.train.loop import Step

OFTEN = 1 / 8
"""Seconds between two drawings."""
SHARE = 0.005
"""Largest share of the time that drawing may take."""
SELDOM = 30.0
"""Seconds between two lines in a file, evaluations and events aside."""
GAP = "   "


class Display:
    """Shows a run of so many steps; with `step` alone a bar, with `record` all that is known."""

    def __init__(self, title: str, steps: int, stream: TextIO | None = None) -> None:
        self.console = Console(file=stream, highlight=False)
        self.title, self.steps, self.figures = title, steps, Figures(steps)
        self.live: Live | None = None
        watched = self.console.is_terminal and not self.console.is_dumb_terminal
        self._next = time.monotonic() + (0.0 if watched else SELDOM)
        if watched:
            self.live = Live(get_renderable=self.panel, console=self.console, refresh_per_second=1, transient=True)
            self.live.start()
            _look_after_children()

    def step(self, step: int, loss: float) -> None:
        """Show that a step is done."""
        self.figures.count(step, loss)
        self._draw()

    def record(self, step: Step, memory: int | None) -> None:
        """Show what is known after a step."""
        self.figures.record(step, memory)
        self._draw()

    def judging(self, share: float) -> None:
        """Show that the model is being judged."""
        self.figures.judging = share
        self._draw()

    def judged(self, step: Step, score: Score) -> None:
        """Show how good the model is, by a line that stays."""
        self.figures.judging = None
        self.figures.judged = step.step, score
        self.say(
            f"{head(step.step, self.steps, step.epoch, step.loss)}  "
            f"test {100 * score.accuracy:5.2f} %, loss {number(score.loss):>7}  {duration(step.elapsed)}"
        )

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Show what else happened, by a line that stays."""
        told = ", ".join(f"{name} {value}" for name, value in values.items())
        self.say(f"{head(step, self.steps, None, None)}  {kind.replace('_', ' ')}{': ' if told else ''}{told}")

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)
        if self.live is None:
            self._next = time.monotonic() + SELDOM

    def end(self, status: str, summary: dict[str, Any], folder: Path | None, resume: str | None) -> None:
        """Take the panel away and say how the run ended, where its results are and how it goes on."""
        self.close()
        score = f", test accuracy {100 * summary['test_accuracy']:.2f} %" if "test_accuracy" in summary else ""
        took = f" in {duration(summary['seconds'])} of training" if "seconds" in summary else ""
        took += f", {duration(summary['seconds_in_all'])} in all" if "seconds_in_all" in summary else ""
        done = summary.get("steps", 0)
        self.say(f"{status} after {done}{f' of {self.steps}' if done != self.steps else ''} steps{took}{score}")
        if folder is not None:
            self.say(f"results: {folder} (a page of them: natgrad report {folder})")
        if resume is not None:
            self.say(f"to go on: {resume}")

    def close(self) -> None:
        """Take the panel away."""
        if self.live is not None:
            self.live.stop()

    def _draw(self) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        if self.live is None:
            self.say(self.figures.essentials())
            return
        self.live.refresh()
        self._next = now + max(OFTEN, (time.monotonic() - now) / SHARE)

    def panel(self) -> Group:
        """Return what is drawn."""
        line = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None):
            line.add_column(ratio=ratio, no_wrap=True)
        figures = self.figures
        bar = ProgressBar(total=self.steps, completed=figures.done)
        line.add_row(Text(self.title, style="bold"), bar, Text(figures.place()))
        return Group(line, *(_text(row, self.console.width) for row in figures.rows() if row))


def _text(row: Row, width: int) -> Text:
    """Return a row of names and values in lines that break between entries only."""
    text, used = Text(no_wrap=True), 0
    for name, value in row:
        long = len(name) + bool(name) + len(value)
        if used:
            text.append("\n" if used + len(GAP) + long > width else GAP)
        used = long if not used or used + len(GAP) + long > width else used + len(GAP) + long
        text.append(f"{name} " if name else "", style="dim").append(value)
    return text


_watched: list[bool] = []


def _look_after_children() -> None:
    """Let processes forked from this one (DataLoader's) write past the panel, whose lock may be held when they fork."""
    if not _watched and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_write_plainly)
    _watched.append(True)


def _write_plainly() -> None:
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
