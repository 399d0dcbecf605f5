"""A comparison's results.json as lines: an optimizer at a size of batch with a budget of steps, over some seeds.

Everything that a page or a table says about who reached what is worked out here, from the judged points alone.
"""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median, median_low
from typing import Any

KINDS = ("first-order", "matrix", "natgrad")


@dataclass(frozen=True)
class Final:
    """A final run. points: (step, seconds of training, accuracy, loss) where it was judged."""

    seed: int
    diverged: int | None
    train_loss: float | None
    points: list[list[float]]
    losses: list[float | None]
    step_seconds: float
    stages: dict[str, float]
    statistics: float | None
    made_by: dict[str, Any]


@dataclass(frozen=True)
class Line:
    """Final runs that differ in their seeds alone."""

    name: str
    kind: str
    batch: str
    samples: int
    of: int
    steps: int
    values: dict[str, Any]
    at_edge: list[str]
    tried: list[dict[str, Any]]
    finals: list[Final]
    far_behind: bool = False
    """Whether one point went on after the first round of tuning."""

    def ends(self, column: int) -> list[float]:
        """The last point's value in each run that did not diverge."""
        return [run.points[-1][column] for run in self.finals if run.points and run.points[-1][column] is not None]

    def end(self, column: int) -> float | None:
        """The median end; None where most runs diverged."""
        ends = self.ends(column)
        return median(ends) if 2 * len(ends) > len(self.finals) else None

    def train_losses(self) -> list[float]:
        return [run.train_loss for run in self.finals if run.train_loss is not None]

    def step_seconds(self) -> float:
        return median(run.step_seconds for run in self.finals)


@dataclass(frozen=True)
class Comparison:
    """Everything a comparison's page shows."""

    name: str
    about: str
    metric: str
    targets: list[float]
    plan: dict[str, Any]
    machine: dict[str, Any]
    lines: list[Line]

    @property
    def column(self) -> int:
        """Where a point has the metric."""
        return {"accuracy": 2, "loss": 3}[self.metric]

    @cached_property
    def batches(self) -> list[str]:
        """Sizes of batch, small to large."""
        return sorted({line.batch for line in self.lines}, key=self.samples)

    @cached_property
    def names(self) -> list[str]:
        return list(dict.fromkeys(line.name for line in self.lines))

    def samples(self, batch: str) -> int:
        return next(line.samples for line in self.lines if line.batch == batch)

    def at(self, batch: str, name: str | None = None, kind: str | None = None) -> list[Line]:
        """Lines at a size of batch, the longer budgets first."""
        some = [line for line in self.lines if line.batch == batch and name in (None, line.name)]
        return sorted((line for line in some if kind in (None, line.kind)), key=lambda line: -line.steps)

    def full(self, batch: str) -> int:
        """The full budget of steps."""
        return max(line.steps for line in self.at(batch))

    def better(self, one: float, other: float) -> bool:
        return one > other if self.metric == "accuracy" else one < other

    def best(self, lines: list[Line]) -> Line | None:
        """The line with the best median end; None where there is none."""
        ended = [line for line in lines if line.end(self.column) is not None]
        sign = -1 if self.metric == "accuracy" else 1
        return min(ended, key=lambda line: sign * (line.end(self.column) or 0.0), default=None)

    def goal_line(self, batch: str) -> Line | None:
        """The tuned first-order optimizer that ends best with the full budget."""
        return self.best([one for one in self.at(batch, kind="first-order") if one.steps == self.full(batch)])

    def goal(self, batch: str) -> float | None:
        """What is to be reached at a size of batch: where the best first-order optimizer ends."""
        line = self.goal_line(batch)
        return line.end(self.column) if line else None

    def reach(self, line: Line, target: float | None) -> tuple[float, float]:
        """Median over seeds (of an even number the lower) of the step and the second at which the target is first
        reached; infinite where most never reach it.
        """
        found = [self._first(run, target) for run in line.finals]
        return median_low(step for step, _ in found), median_low(second for _, second in found)

    def fewest(self, batch: str, name: str, target: float | None) -> tuple[float, float]:
        """Fewest steps and least seconds to the target, over the budgets, each by itself."""
        found = [self.reach(line, target) for line in self.at(batch, name)] or [(math.inf, math.inf)]
        return min(step for step, _ in found), min(second for _, second in found)

    def _first(self, run: Final, target: float | None) -> tuple[float, float]:
        for point in run.points:
            value = point[self.column]
            if target is not None and value is not None and not self.better(target, value):
                return point[0], point[1]
        return math.inf, math.inf

    def text(self, value: float | None) -> str:
        """The metric as text."""
        if value is None:
            return "diverged"
        return f"{100 * value:.2f} %" if self.metric == "accuracy" else f"{value:.4f}"


def is_comparison(folder: Path) -> bool:
    """Whether a folder holds a finished comparison."""
    return (folder / "results.json").exists()


def read_comparison(folder: Path) -> Comparison:
    """Read a comparison's folder."""
    path = folder / "results.json"
    try:
        return comparison_of(json.loads(path.read_text()))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(path)!r} is no comparison that this version can read ({error}); make it anew") from None


def comparison_of(results: dict[str, Any]) -> Comparison:
    """Sort plain values into lines."""
    plan = results["plan"]
    lines = [_line(cell, budget) for cell in results["cells"] for budget in cell["budgets"]]
    task = plan["task"]
    return Comparison(task["name"], results["about"], task["metric"], plan["targets"], plan, results["machine"], lines)


def _line(cell: dict[str, Any], budget: dict[str, Any]) -> Line:
    finals = [Final(**{name: run[name] for name in Final.__dataclass_fields__}) for run in budget["finals"]]
    given = {name: budget[name] for name in ("steps", "values", "at_edge", "tried")}
    held = {name: cell[name] for name in ("kind", "samples", "of")}
    held["far_behind"] = cell.get("far_behind", False)
    return Line(name=cell["contender"], batch=str(cell["batch"]), finals=finals, **held, **given)
