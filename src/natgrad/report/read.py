"""A comparison's final runs become curves: the runs of one optimizer with one budget of steps, over seeds.

A run of results.json:

    contender, values, seed, budget, batch, steps [step, loss, seconds, elapsed, stages, ...],
    evaluations [step, elapsed, accuracy, loss, train_loss]
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

Run = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """Runs that differ in their seeds alone."""

    name: str
    budget: int
    runs: list[Run]

    def ends(self, key: str) -> list[float]:
        """Return the last evaluation's value in each run, where it has one."""
        last = [run["evaluations"][-1].get(key) for run in self.runs if run["evaluations"]]
        return [value for value in last if value is not None]

    def middle_run(self) -> Run:
        """Return the run of the first seed, for what cannot be averaged."""
        return min(self.runs, key=lambda run: run["seed"])

    def seconds_per_step(self) -> float:
        """Return the median over all steps of all runs."""
        return median(step["seconds"] for run in self.runs for step in run["steps"])


@dataclass(frozen=True)
class Results:
    """Everything a page shows."""

    title: str
    about: str
    curves: list[Curve]
    machine: dict[str, Any]
    facts: dict[str, Any]
    tuned: list[dict[str, Any]] = field(default_factory=list)

    @property
    def baseline(self) -> Curve:
        """Return what the others are measured against: the first curve."""
        return self.curves[0]


def read(folders: list[Path]) -> Results:
    """Read one comparison."""
    return comparison(_json(folders[0] / "results.json"))


def comparison(results: dict[str, Any]) -> Results:
    """Sort a comparison's final runs into curves, the baseline first, long budgets before short ones."""
    plan = results["plan"]
    facts = {
        "network": words(plan["task"]["model"]),
        "data": words(plan["task"]["data"]),
        "batch": results["batch"],
        "steps": plan["steps"],
        "tuning": f"{plan['trials']} points each, the best {plan['finalists']} again with two more seeds, "
        f"judged on {plan['held_out']:.0%} of the training images",
        "seeds": ", ".join(str(seed) for seed in sorted({run["seed"] for run in results["finals"]})),
    }
    title, names = f"Comparison: {plan['task']['name']}", [entry["name"] for entry in results["tuned"]]
    curves = _curves(results["finals"], names)
    return Results(title, results["about"], curves, results["machine"], facts, results["tuned"])


def words(settings: dict[str, Any]) -> str:
    """Return nested settings in words: the kind, then its fields."""
    inner = [f"{name} {words(value) if isinstance(value, dict) else value}" for name, value in settings.items()]
    return f"{settings['kind']} ({', '.join(inner[1:])})" if len(inner) > 1 else str(settings["kind"])


def _curves(runs: list[Run], names: list[str]) -> list[Curve]:
    groups: dict[tuple[int, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((-run["budget"], names.index(run["contender"])), []).append(run)
    return [Curve(names[place], -budget, groups[budget, place]) for budget, place in sorted(groups)]


def _json(path: Path) -> Any:
    return json.loads(path.read_text())
