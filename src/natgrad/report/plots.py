"""The figures of a page, each a function of results alone.

Lines are medians over seeds, bands their range; a dashed line is a shorter budget of steps.
"""

from collections.abc import Callable
from statistics import fmean, median
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from natgrad.report.heat import heat
from natgrad.report.read import Curve, Results
from natgrad.report.style import COLOURS, INK
from natgrad.report.table import goal

STAGES = {
    "data": "#D9D9D9",
    "network": "#0072B2",
    "measure": "#E69F00",
    "messages": "#CC79A7",
    "factor": "#D55E00",
    "precondition": "#009E73",
    "update": "#999999",
    "other": "#444444",
}
"""A colour for each stage: blue is the network, warm is curvature, grey is the rest."""


def colour(results: Results, curve: Curve) -> str:
    """Return an optimizer's colour: its own in every figure."""
    names = list(dict.fromkeys(other.name for other in results.curves))
    return COLOURS[names.index(curve.name) % len(COLOURS)]


def accuracy(results: Results) -> Figure:
    """Test accuracy by step and by second of training."""
    figure = Figure(figsize=(10.4, 3.9), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for curve in results.curves:
        _draw(by_step, results, curve, "accuracy", lambda point: point["step"])
        _draw(by_time, results, curve, "accuracy", lambda point: point["elapsed"])
    target = goal(results)
    for axes, label in ((by_step, "step"), (by_time, "seconds of training")):
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        if target is not None and results.tuned:
            axes.axhline(target, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
    ends = [value for curve in results.curves for value in curve.ends("accuracy")]
    if ends:
        by_step.set_ylim(max(0.0, 1 - 6 * (1 - min(ends)) - 0.05), min(1.0, max(ends) + 0.02))
    by_step.yaxis.set_major_formatter(PercentFormatter(1.0))
    by_step.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_step.set_title("Test accuracy by step")
    by_time.set_title("Test accuracy by time")
    if target is not None and results.tuned:
        label = f"{results.baseline.name}'s final accuracy"
        by_step.annotate(label, (0, target), (4, 3), textcoords="offset points", fontsize=8.5, color="#555555")
    if by_time.lines:
        by_time.legend(loc="lower right")
    return figure


def loss(results: Results) -> Figure:
    """Training loss by step: on the whole training set where it was measured, else on each batch."""
    whole = any(curve.ends("train_loss") for curve in results.curves)
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for curve in results.curves:
        key, points = ("train_loss", "evaluations") if whole else ("loss", "steps")
        _draw(axes, results, curve, key, lambda point: point["step"], points)
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_title("Loss on all training images" if whole else "Loss on each batch")
    axes.legend()
    return figure


def stages(results: Results) -> Figure:
    """Where a step's time goes, for each optimizer with its full budget: means over steps, stacked."""
    curves = [curve for curve in results.curves if curve.budget == results.baseline.budget]
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    parts = [_stage_seconds(curve) for curve in curves]
    names = list(dict.fromkeys(name for part in parts for name in part))
    left = [0.0] * len(curves)
    for name in names:
        widths = [1e3 * part.get(name, 0.0) for part in parts]
        axes.barh(range(len(curves)), widths, left=left, height=0.55, color=STAGES.get(name, "#999999"), label=name)
        left = [before + width for before, width in zip(left, widths)]
    axes.set_yticks(range(len(curves)), [curve.name for curve in curves])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("milliseconds per step")
    axes.set_title("Where a step's time goes")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8.5)
    return figure


def intervals(results: Results) -> Figure | None:
    """Steps for which each statistic is kept, dark for few; None for first-order optimizers."""
    run = next((curve.middle_run() for curve in results.curves if _ages(curve.middle_run())), None)
    if run is None:
        return None
    return heat(_ages(run), f"Steps from one measurement to the next: {run['contender']}, seed {run['seed']}")


def tuning(results: Results) -> Figure | None:
    """What tuning tried: held-out accuracy by learning rate, near the best; None where nothing was."""
    if not results.tuned:
        return None
    figure = Figure(figsize=(10.4, 3.2), layout="constrained")
    plots = np.atleast_1d(np.asarray(figure.subplots(1, len(results.tuned), sharey=True)))
    for axes, entry, shade in zip(plots, results.tuned, COLOURS):
        _trials(axes, entry, shade)
    tried = [trial["accuracy"] for entry in results.tuned for trial in entry["trials"]]
    plots[0].set_ylim(bottom=max(min(tried) - 0.01, max(tried) - 0.15))
    plots[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def _trials(axes: Axes, entry: dict[str, Any], shade: str) -> None:
    """Draw a line for each setting of the other numbers, means over seeds, and ring the point that was chosen."""
    found: dict[str, dict[float, list[float]]] = {}
    for trial in entry["trials"]:
        by_rate = found.setdefault(_others(trial["values"]), {})
        by_rate.setdefault(trial["values"]["lr"], []).append(trial["accuracy"])
    for place, (rest, by_rate) in enumerate(found.items()):
        axes.plot(
            *zip(*sorted((rate, fmean(seen)) for rate, seen in by_rate.items())),
            marker="os^Dvph*"[place % 8],
            markersize=4.5,
            linewidth=1.1,
            color=shade,
            alpha=1 - 0.75 * place / len(found),
            label=rest,
        )
    rate = entry["values"]["lr"]
    chosen = fmean(found[_others(entry["values"])][rate])
    ring = {"s": 150, "facecolors": "none", "edgecolors": INK, "linewidths": 1.3, "zorder": 5}
    axes.scatter([rate], [chosen], **ring)
    axes.set_xscale("log")
    rates = sorted({trial["values"]["lr"] for trial in entry["trials"]})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("learning rate")
    axes.set_title(f"Tuning {entry['name']} (held-out accuracy; ring: chosen)")
    axes.legend(fontsize=7.5)


def _others(values: dict[str, Any]) -> str:
    """Return all values but the learning rate, in words."""
    return ", ".join(f"{name} {value}" for name, value in values.items() if name != "lr")


def _draw(
    axes: Axes,
    results: Results,
    curve: Curve,
    key: str,
    where: Callable[[dict[str, Any]], float],
    points: str = "evaluations",
) -> None:
    """Draw a curve's median and range over seeds."""
    runs = [[point for point in run[points] if point.get(key) is not None] for run in curve.runs]
    length = min(len(run) for run in runs)
    if length == 0:
        return
    columns = [[run[place] for run in runs] for place in range(length)]
    x = [median(where(point) for point in column) for column in columns]
    values = [[point[key] for point in column] for column in columns]
    shade = colour(results, curve)
    short = curve.budget != results.baseline.budget
    style: dict[str, Any] = {"color": shade, "linestyle": (0, (4, 2)) if short else "-"}
    axes.plot(x, [median(row) for row in values], label=f"{curve.name}, {curve.budget} steps", **style)
    low, high = [min(row) for row in values], [max(row) for row in values]
    axes.fill_between(x, low, high, color=shade, alpha=0.13, linewidth=0)


def _stage_seconds(curve: Curve) -> dict[str, float]:
    """Return the mean seconds of each stage in a step, in the legend's order, first steps left out."""
    steps = [step["stages"] for run in curve.runs for step in run["steps"][1:] or run["steps"]]
    named = [name for name in STAGES if any(name in stages for stages in steps)]
    others = [name for name in dict.fromkeys(name for stages in steps for name in stages) if name not in STAGES]
    return {name: sum(stages.get(name, 0.0) for stages in steps) / len(steps) for name in named + others}


def _ages(run: dict[str, Any]) -> list[dict[str, int]]:
    return [step["intervals"] for step in run["steps"] if step.get("intervals")]
