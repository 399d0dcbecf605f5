"""What is kept of a comparison: results.json, all that a page needs and not much more."""

from collections.abc import Iterable
from statistics import fmean, median
from typing import Any

from natgrad_lab.compare.cell import Outcome, Tuned


def results_of(plan: Any, about: str, outcomes: list[Outcome], machine: dict[str, Any]) -> dict[str, Any]:
    """Return a comparison as plain values."""
    return {
        "kind": "comparison",
        "about": about,
        "plan": plan,
        "machine": machine,
        "cells": [cell_values(outcome) for outcome in outcomes],
    }


def cell_values(outcome: Outcome) -> dict[str, Any]:
    """A contender at a size of batch: for each budget, what was chosen, what was tried, and the final runs."""
    first = outcome.finals[0]
    return {
        "contender": outcome.contender.name,
        "kind": outcome.contender.kind,
        "batch": outcome.batch,
        "samples": first["samples"],
        "of": first["of"],
        "far_behind": outcome.far_behind,
        "budgets": [budget_values(outcome, tuned) for tuned in outcome.tuned],
    }


def budget_values(outcome: Outcome, tuned: Tuned) -> dict[str, Any]:
    """What became of a number of steps."""
    finals = [final for final in outcome.finals if final["budget"] == tuned.steps]
    return {
        "steps": tuned.steps,
        "values": tuned.values,
        "at_edge": outcome.contender.edges(tuned.values),
        "tried": [{"values": values, "runs": [end_values(run) for run in runs]} for values, runs in tuned.tried],
        "finals": [final_values(final) for final in finals],
    }


def end_values(run: Any) -> dict[str, Any]:
    """How a trial of the tuning ended."""
    end = run["evaluations"][-1] if run["evaluations"] else {}
    return {"seed": run["seed"], "accuracy": rounded(end.get("accuracy")), "loss": rounded(end.get("loss"))}


def final_values(run: Any) -> dict[str, Any]:
    """A final run: where it was judged, and what its steps took, on average and in the median."""
    steps = run["steps"]
    sent = [step["traffic"].get("statistics", 0) for step in steps if "traffic" in step]
    shares = [step["refreshed"] for step in steps if "refreshed" in step]
    return {
        "seed": run["seed"],
        "diverged": run["diverged"],
        "train_loss": rounded(run["train_loss"]),
        "points": [
            [e["step"], *(rounded(e[name]) for name in ("elapsed", "accuracy", "loss"))] for e in run["evaluations"]
        ],
        "losses": [rounded(step["loss"], 4) for step in steps],
        "step_seconds": rounded(median(step["seconds"] for step in steps)) if steps else None,
        "stages": means(step["stages"] for step in steps[1:] or steps),
        "statistics": rounded(fmean(sent)) if sent else None,
        "refreshed": rounded(fmean(shares)) if shares else None,
        "made_by": run["made_by"],
    }


def means(stages: Iterable[dict[str, float]]) -> dict[str, float | None]:
    """Mean seconds of every stage."""
    listed = list(stages)
    names = dict.fromkeys(name for one in listed for name in one)
    return {name: rounded(fmean(one.get(name, 0.0) for one in listed)) for name in names}


def rounded(value: float | None, digits: int = 6) -> float | None:
    """So many significant digits."""
    return None if value is None else float(f"{value:.{digits}g}")
