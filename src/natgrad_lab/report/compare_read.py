"""A comparison's results.json as lines: an optimizer at a size of batch with a budget of steps, over some seeds.

Everything that a page or a table says about who reached what is worked out here, from the evaluated points alone. What
is read becomes numbers and texts of the kind that they must be; a file that holds anything else is refused.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median, median_low
from typing import Any

from natgrad_lab.report.files import number, numbers, one_line, read_json
from natgrad_lab.report.markup import text

KINDS = ("first-order", "matrix", "natgrad")
MOST = {"optimizers": 64, "sizes of batch": 24, "seeds": 64, "budgets of steps": 4, "points of tuning": 2000}
"""What a page has room for."""
NAME = 60
"""Letters of a name."""


@dataclass(frozen=True)
class Final:
    """A final run. points: (step, seconds of training, accuracy, loss) where it was evaluated."""

    seed: int
    diverged: int | None
    train_loss: float | None
    points: list[list[Any]]
    losses: list[float | None]
    step_seconds: float
    """Infinite where no step was made."""
    stages: dict[str, float]
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

    @property
    def halved(self) -> bool:
        """Whether an optimizer was tuned for two numbers of steps at some size of batch."""
        return any(line.steps < self.full(line.batch) for line in self.lines)

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
        return comparison_of(read_json(path))
    except FileNotFoundError:
        raise ValueError(f"{str(path)!r} is not there; natgrad compare writes it at its end") from None
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"{str(path)!r} is no comparison that this version can read ({what}); make it anew") from None


def comparison_of(results: dict[str, Any]) -> Comparison:
    """Sort plain values into lines; KeyError or TypeError where something is missing or of another kind."""
    plan = _plan(results["plan"])
    lines = [_line(cell, budget) for cell in results["cells"] for budget in cell["budgets"]]
    task, metric = plan["task"], plan["task"]["metric"]
    if metric not in ("accuracy", "loss"):
        raise TypeError("metric is neither accuracy nor loss")
    targets = [target for one in plan["targets"] if (target := number(one)) is not None]
    about = text(results["about"])
    found = Comparison(task["name"], about, metric, targets[:8], plan, _machine(results["machine"]), lines)
    for what, count in {
        "optimizers": len(found.names),
        "sizes of batch": len({line.batch for line in lines}),
        "seeds": max((len(line.finals) for line in lines), default=0),
        "budgets of steps": max((len(cell["budgets"]) for cell in results["cells"]), default=0),
        "points of tuning": max((len(line.tried) for line in lines), default=0),
    }.items():
        if count > MOST[what]:
            raise TypeError(f"{count} {what}, where a page has room for {MOST[what]}")
    if not lines or not all(line.finals for line in lines):
        raise TypeError("an optimizer has no final run")
    if len({(line.batch, line.samples) for line in lines}) > len(found.batches):
        raise TypeError("one batch has two numbers of samples")
    return found


def _plan(plan: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a plan that a page shows."""
    task, profile, spaces = plan["task"], plan["profile"], plan["spaces"]
    recipe = task["recipe"]
    settings = plan.get("settings")
    share = number(profile.get("far_behind"))
    return {
        "task": {
            "name": text(task["name"], NAME),
            "metric": task["metric"],
            "held_out": _float(task["held_out"]),
            "recipe": {part: {"kind": "?", **_texts(recipe[part])} for part in ("data", "model")},
        },
        "targets": _list(plan["targets"]),
        "profile": {
            **{name: _count(profile[name]) for name in ("finalists", "seeds")},
            "trials": _count(profile["trials"], least=0),  # none where settings are those of another comparison
            "halving": bool(profile["halving"]),
            "far_behind": 0.0 if share is None else share,
        },
        "spaces": {text(name, NAME): _texts(space) for name, space in list(spaces.items())[: MOST["optimizers"]]},
        "settings": _texts(settings) if settings else None,
        "ranks": _count(plan["ranks"]),
        "workers": _count(plan["workers"]),
    }


def _machine(machine: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of the machine, a dash for what is not."""
    known = ("command", "device", "cores", "system", "date")
    return {name: text(machine.get(name, "-")) for name in known} | {"versions": _texts(machine.get("versions") or {})}


def _line(cell: dict[str, Any], budget: dict[str, Any]) -> Line:
    if cell["kind"] not in KINDS:
        raise TypeError("an optimizer of another kind")
    values = {text(name, NAME): _scalar(value) for name, value in budget["values"].items()}
    return Line(
        name=text(cell["contender"], NAME),
        kind=cell["kind"],
        batch=text(cell["batch"], NAME),
        samples=_count(cell["samples"]),
        of=_count(cell["of"]),
        steps=_count(budget["steps"]),
        values=values,
        at_edge=[name for name in map(str, _list(budget["at_edge"])) if name in values],
        tried=[_tried(one) for one in _list(budget["tried"])],
        finals=[_final(run) for run in _list(budget["finals"])],
        far_behind=bool(cell.get("far_behind", False)),
    )


def _final(run: dict[str, Any]) -> Final:
    seconds = number(run["step_seconds"])
    return Final(
        seed=_count(run["seed"], 0),
        diverged=None if run["diverged"] is None else _count(run["diverged"], 0),
        train_loss=number(run["train_loss"]),
        points=[[_float(p[0]), _float(p[1]), number(p[2]), number(p[3])] for p in _list(run["points"])],
        losses=[number(loss) for loss in _list(run["losses"])],
        step_seconds=math.inf if seconds is None else seconds,
        stages=numbers(run["stages"], 24),
        made_by={"commit": text(run["made_by"]["commit"], NAME)},
    )


def _tried(one: dict[str, Any]) -> dict[str, Any]:
    values = {text(name, NAME): _scalar(value) for name, value in one["values"].items()}
    return {"values": values, "runs": [{"loss": number(run["loss"])} for run in _list(one["runs"])]}


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{one_line(value, 40)} is no list")
    return value


def _count(value: Any, least: int = 1) -> int:
    if type(value) is not int or not least <= value < 2**53:
        raise TypeError(f"{one_line(value, 40)} is no count")
    return value


def _float(value: Any) -> float:
    found = number(value)
    if found is None:
        raise TypeError(f"{one_line(value, 40)} is no number")
    return found


def _scalar(value: Any) -> Any:
    """Return a setting: a number, a truth, None, or text."""
    known = number(value) is not None or isinstance(value, bool) or value is None
    return value if known else text(value, 4 * NAME)


def _texts(values: Any) -> dict[str, str]:
    return {text(name, NAME): text(value, 4 * NAME) for name, value in list(values.items())[: MOST["optimizers"]]}
