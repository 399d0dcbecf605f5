"""Folders become curves: the runs of one optimizer with one budget of steps, over seeds.

A comparison's results.json holds runs already; a folder of `natgrad train` (recipe.json, metrics.jsonl)
becomes one run of the same form:

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
    """Read one comparison, or any number of runs."""
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"there is no folder {str(folder)!r}; natgrad report takes folders that a run has written")
    if (folders[0] / "results.json").exists():
        if len(folders) > 1:
            raise ValueError(f"{str(folders[0])!r} is a comparison, which has a page to itself; name it alone")
        return comparison(_json(folders[0] / "results.json"))
    return of_runs(folders)


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


def of_runs(folders: list[Path]) -> Results:
    """Read folders of `natgrad train`; runs of one recipe that differ in seeds become one curve."""
    runs, names = [], []
    for folder in folders:
        runs.append(_run(folder))
        names += [runs[-1]["contender"]] if runs[-1]["contender"] not in names else []
    first = _json(folders[0] / "recipe.json")
    recipe = first["recipe"]
    facts = {
        "network": words(recipe["model"]),
        "data": words(recipe["data"]),
        "batch": recipe["batch"],
        "seeds": ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs})),
    }
    title = f"Run: {names[0]}" if len(names) == 1 else f"Runs: {', '.join(names)}"
    return Results(title, "What natgrad train has recorded.", _curves(runs, names), first["machine"], facts)


def words(settings: dict[str, Any]) -> str:
    """Return nested settings in words: the kind, then its fields."""
    inner = [f"{name} {words(value) if isinstance(value, dict) else value}" for name, value in settings.items()]
    return f"{settings['kind']} ({', '.join(inner[1:])})" if len(inner) > 1 else str(settings["kind"])


def _curves(runs: list[Run], names: list[str]) -> list[Curve]:
    groups: dict[tuple[int, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((-run["budget"], names.index(run["contender"])), []).append(run)
    return [Curve(names[place], -budget, groups[budget, place]) for budget, place in sorted(groups)]


def _run(folder: Path) -> Run:
    if not (folder / "recipe.json").exists() or not (folder / "metrics.jsonl").exists():
        raise ValueError(f"{str(folder)!r} has no recipe.json and metrics.jsonl; natgrad train writes such folders")
    about = _json(folder / "recipe.json")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    if not steps:
        raise ValueError(f"{str(folder)!r} holds no step yet; its run ended, or is, before the first")
    return {
        "contender": about["name"],
        "values": {},
        "seed": about["recipe"]["seed"],
        "budget": about["steps"],
        "batch": about["recipe"]["batch"],
        "steps": steps,
        "evaluations": [_evaluation(line) for line in lines if line["kind"] == "evaluation"],
    }


def _evaluation(line: dict[str, Any]) -> dict[str, Any]:
    names = {"test_accuracy": "accuracy", "test_loss": "loss"}
    return {names.get(name, name): value for name, value in line.items() if name != "kind"}


def _json(path: Path) -> Any:
    return json.loads(path.read_text())
