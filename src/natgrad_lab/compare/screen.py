"""What a comparison shows while it runs: a bar where someone is watching, else a line now and then."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY = 60.0
"""Seconds between two lines of progress where the output goes to a file."""


class Screen:
    """Counts steps of all trials, those that were remembered among them."""

    def __init__(self, title: str, steps: int) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.steps, self.made, self.known = steps, 0, 0
        self.began = self.told = time.monotonic()
        self.bar: Progress | None = None
        if self.console.is_terminal:
            columns = (
                TextColumn(title),
                BarColumn(),
                TextColumn("{task.percentage:.0f} %"),
                TextColumn("{task.fields[note]}"),
            )
            times = (TimeElapsedColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, *times, console=self.console, transient=True)
            self.bar.start()
            self.task = self.bar.add_task(title, total=steps, note="")

    def trial(self, title: str, steps: int, remembered: bool) -> None:
        """Count a trial that is done."""
        self.known += steps if remembered else 0
        self.made += 0 if remembered else steps
        if self.bar is not None:
            self.bar.update(self.task, completed=self.known + self.made, note=title[:48])
        elif time.monotonic() - self.told > EVERY:
            self.told = time.monotonic()
            self.say(f"{(self.known + self.made) / self.steps:.0%} of all steps, {self.left()}")

    def drop(self, steps: int) -> None:
        """Take steps away that will not be made."""
        self.steps -= steps
        if self.bar is not None:
            self.bar.update(self.task, total=self.steps)

    def left(self) -> str:
        """Say how much longer it takes at the present pace, in words."""
        pace = self.made / max(time.monotonic() - self.began, 1e-9)
        if not pace:
            return "no trial made yet"
        minutes = (self.steps - self.known - self.made) / pace / 60
        return f"about {minutes:.0f} minutes left"

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()
