"""How far a run is and how fast, in words: plain values in, text out.

A step's seconds, its stages and its share of refreshed statistics are running means over some twenty steps, so
that they can be read. What is left takes, for each step, the mean of its seconds and what has passed beside
the steps so far (judging, saving), spread over them.
"""

import time
from collections.abc import Callable

from natgrad_lab.report.number_format import brief, duration, number, size
from natgrad_lab.train.evaluate import Score
from natgrad_lab.train.loop import Step

MEMORY = 0.05
"""Weight of the newest step in a running mean, once there are as many steps."""
SMALLEST = 0.005
"""Share of a step below which a stage is not named, unless it has been more before."""

ORDER = ("data", "network", "measure", "checksum", "messages", "factor", "precondition", "probe", "update", "other")
"""Stages as they follow one another; others come after them."""

Row = list[tuple[str, str]]
"""Names and values; a name may be empty."""


class Figures:
    """Takes in steps and evaluations of a run of so many `steps`."""

    def __init__(self, steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.steps, self.clock = steps, clock
        self.begun = clock()
        self.done = self.calls = 0
        self.trained = self.seconds = self.refreshed = 0.0
        self.stages: dict[str, float] = {}
        self.named: set[str] = set()
        self.loss: float | None = None
        self.last: Step | None = None
        self.memory: int | None = None
        self.judged: tuple[int, Score] | None = None
        self.judging: float | None = None
        """Share of an evaluation that is done; None: none is under way."""

    def count(self, done: int, loss: float) -> None:
        """Take in that one more step is done, of which nothing is known but its number and loss."""
        self.done, self.loss = done, loss
        self.calls += 1

    def record(self, step: Step, memory: int | None) -> None:
        """Take in all that is known of a step."""
        if self.last is None:
            self.begun = self.clock() - step.seconds  # what came before, reading the data, is no measure
        self.count(step.step, step.loss)
        weight = max(1 / self.calls, MEMORY)
        self.last, self.memory = step, memory
        self.trained += step.seconds
        self.seconds += weight * (step.seconds - self.seconds)
        self.refreshed += weight * (step.second_order.get("refreshed", 0.0) - self.refreshed)
        for stage in {**self.stages, **step.stages}:
            before = self.stages.get(stage, 0.0)
            self.stages[stage] = before + weight * (step.stages.get(stage, 0.0) - before)
            if self.stages[stage] > SMALLEST * self.seconds:
                self.named.add(stage)

    def left(self) -> float | None:
        """Return the seconds until the end, None before the first step."""
        if not self.calls:
            return None
        beside = max(0.0, self.clock() - self.begun - self.trained) / self.calls
        return (self.steps - self.done) * (self.seconds + beside)

    def place(self) -> str:
        """Return how far the run is."""
        epoch = f"  epoch {self.last.epoch:.1f}" if self.last is not None else ""
        return f"{self.done}/{self.steps}{epoch}" + self._coming()

    def _coming(self) -> str:
        """Return what is under way beside steps, or how long they take yet."""
        if self.judging is not None:
            return f"  evaluating {self.judging:.0%}"
        left = self.left()
        return f"  ETA {duration(left)}" if left is not None else ""

    def rows(self) -> list[Row]:
        """Return what is known beside, in rows of names and values."""
        score = [("loss", "-" if self.loss is None else number(self.loss))]
        if self.last is None:
            return [score] if self.loss is not None else []
        if self.judged is not None:
            score.append(("test accuracy", f"{100 * self.judged[1].accuracy:.2f} % (step {self.judged[0]})"))
        numbers = [("lr", f"{self.last.lr:.3g}")]
        second = self.last.second_order
        if "damping" in second:
            numbers.append(("damping", f"{second['damping']:.3g}"))
        if second.get("factor", 1.0) < 1:
            numbers.append(("step", f"{second['factor']:.0%} of lr"))
        speed = [("", f"{brief(self.seconds)} a step"), ("", f"{self.last.images_per_second:.0f} images/s")]
        if "refreshed" in second:
            speed.append(("refreshed", f"{self.refreshed:.0%}"))
        if self.memory is not None:
            speed.append(("memory", size(self.memory)))
        speed.append(("time", duration(self.last.elapsed)))
        if second.get("skipped"):
            numbers.append(("skipped", str(second["skipped"])))
        return [score + numbers, speed, self.split()]

    def split(self) -> Row:
        """Return the share of each stage in a step."""
        ordered = [stage for stage in (*ORDER, *sorted(self.named - {*ORDER})) if stage in self.named]
        return [(stage, f"{self.stages[stage] / max(self.seconds, 1e-9):.0%}") for stage in ordered]

    def essentials(self) -> str:
        """Return one line for a file."""
        epoch, rate = (self.last.epoch, f"  lr {self.last.lr:.3g}") if self.last is not None else (None, "")
        return (
            head(self.done, self.steps, epoch, self.loss)
            + (f"  {brief(self.seconds)} a step" if self.seconds else "")
            + rate
            + self._coming()
        )


def head(done: int, steps: int, epoch: float | None, loss: float | None) -> str:
    """Return how a line begins that stands below others of its kind."""
    place = f"step {done:>{len(str(steps))}}/{steps}"
    passed = f"  epoch {epoch:>5.1f}" if epoch is not None else ""
    return place + passed + (f"  loss {number(loss):>7}" if loss is not None else "")
