"""The comparison in numbers: a row a curve, and what they say in a sentence."""

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

from natgrad.report.read import Curve, Results, Run

HEADINGS = (
    "optimizer",
    "steps",
    "steps to goal",
    "seconds to goal",
    "test accuracy, % (range)",
    "train loss (range)",
    "ms per step",
    "statistics KB per step",
)

NARROW = (
    "\n\noptimizer",
    "\n\nsteps",
    "steps\nto\ngoal",
    "seconds\nto\ngoal",
    "\ntest accuracy\n%, (range)",
    "\ntrain loss\n(range)",
    "ms\nper\nstep",
    "statistics\nKB per\nstep",
)
"""The headings for a terminal of 80 letters, where ranges have a line of their own."""


@dataclass(frozen=True)
class Row:
    """A curve's figures: medians over its seeds."""

    name: str
    budget: int
    steps: float
    """Steps until the goal, infinite where not reached."""
    seconds: float
    accuracy: list[float]
    train_loss: list[float]
    step_seconds: float
    statistics: float | None
    """Bytes of statistics that rank 0 sends in a step, on average; None for first-order optimizers."""

    def cells(self) -> list[str]:
        """Return the figures as text, in the order of the headings."""
        return [
            self.name,
            str(self.budget),
            f"{self.steps:g}" if math.isfinite(self.steps) else "never",
            f"{self.seconds:.2f}" if math.isfinite(self.seconds) else "-",
            spread(self.accuracy, lambda value: f"{100 * value:.2f}"),
            spread(self.train_loss, lambda value: f"{value:.4f}"),
            f"{1e3 * self.step_seconds:.1f}",
            "-" if self.statistics is None else f"{self.statistics / 1e3:.1f}",
        ]


def goal(results: Results) -> float | None:
    """Return the accuracy to reach: the median with which the baseline ends."""
    ends = results.baseline.ends("accuracy")
    return median(ends) if ends else None


def rows(results: Results) -> list[Row]:
    """Return a row for each curve."""
    target = goal(results)
    return [_row(curve, target) for curve in results.curves]


def _row(curve: Curve, target: float | None) -> Row:
    reached = [first(run, target) for run in curve.runs]
    return Row(
        name=curve.name,
        budget=curve.budget,
        steps=median(point[0] for point in reached),
        seconds=median(point[1] for point in reached),
        accuracy=curve.ends("accuracy"),
        train_loss=curve.ends("train_loss"),
        step_seconds=curve.seconds_per_step(),
        statistics=_statistics(curve),
    )


def first(run: Run, target: float | None) -> tuple[float, float]:
    """Return the step and second at which a run first has the accuracy, infinite where it never has."""
    for point in run["evaluations"]:
        if target is not None and point["accuracy"] >= target:
            return point["step"], point["elapsed"]
    return math.inf, math.inf


def _statistics(curve: Curve) -> float | None:
    sent = [step["traffic"].get("statistics", 0) for run in curve.runs for step in run["steps"] if "traffic" in step]
    return sum(sent) / len(sent) if sent else None


def spread(values: list[float], text: Any) -> str:
    """Return the median and, of several values, the range."""
    if not values:
        return "-"
    middle = text(median(values))
    return middle if len(values) == 1 else f"{middle} ({text(min(values))}-{text(max(values))})"


def findings(results: Results) -> list[str]:
    """Say what a comparison shows, one sentence for each contender and thing."""
    target, baseline = goal(results), results.baseline
    if target is None or not results.tuned:
        return []
    said = [f"Tuned {baseline.name} ends with {100 * target:.2f} % after {baseline.budget} steps (the goal)."]
    by_place = {(row.name, row.budget): row for row in rows(results)}
    for row in by_place.values():
        if row.name == baseline.name:
            continue
        if row.budget == baseline.budget:
            said.append(_reaching(row, by_place[baseline.name, baseline.budget]))
        else:
            said.append(_shorter(row, by_place[baseline.name, baseline.budget]))
    said += [
        f"Tuning {entry['name']} chose {name} at the edge of its grid; a wider grid may be better."
        for entry in results.tuned
        for name in entry["at_edge"]
    ]
    return said


def _reaching(row: Row, base: Row) -> str:
    if not math.isfinite(row.steps):
        return f"{row.name} does not reach the goal in {row.budget} steps."
    return f"{row.name} reaches the goal after {row.steps:g} of {base.budget} steps, in {row.seconds:.2f} s."


def _shorter(row: Row, base: Row) -> str:
    ours, theirs = median(row.train_loss), median(base.train_loss)
    side = "below" if ours < theirs else "not below"
    end = f"ends with {100 * median(row.accuracy):.2f} %"
    reach = f"reaches the goal after {row.steps:g} and {end}" if math.isfinite(row.steps) else end
    return (
        f"{row.name} trained for {row.budget} steps {reach}; its train loss is {ours:.4f}, "
        f"{side} {base.name}'s {theirs:.4f} after {base.budget}."
    )


def show(results: Results) -> None:
    """Print the table and the findings on a terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    printed = Table(title=results.title, title_justify="left", box=None, collapse_padding=True, pad_edge=False)
    for place, heading in enumerate(NARROW):
        printed.add_column(heading, justify="left" if place == 0 else "right", no_wrap=True)
    for row in rows(results):
        printed.add_row(*(cell.replace(" (", "\n(") for cell in row.cells()))
    console.print(printed)
    console.print()
    for sentence in findings(results):
        console.print(sentence, soft_wrap=True)
