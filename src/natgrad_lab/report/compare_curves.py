"""The figures of a comparison at one size of batch: curves, losses, what tuning tried, where a step's time goes."""

import math
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from natgrad_lab.report.compare_plots import COLOURS, looks, zoom
from natgrad_lab.report.compare_read import Comparison, Final, Line
from natgrad_lab.report.style import INK, STAGES


def curves(results: Comparison, batch: str) -> Figure:
    """The metric by step, by epoch and by time at one size of batch; thick: the best of each kind."""
    figure = Figure(figsize=(10.4, 4.1), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    lines = [line for line in results.at(batch) if line.steps == results.full(batch)]
    best = [results.best([line for line in lines if line.kind == kind]) for kind in COLOURS]
    samples, of = lines[0].samples, lines[0].of
    wheres: tuple[tuple[str, Callable[[list[float]], float]], ...] = (
        ("step", lambda point: point[0]),
        ("epoch", lambda point: point[0] * samples / of),
        ("seconds of training", lambda point: point[1]),
    )
    styles = looks(results)
    for axes, (label, where) in zip(panels, wheres):
        for line in lines:
            thick = any(line is one for one in best)
            style = {
                "color": styles[line.name]["color"],
                "linewidth": 2.4 if thick else 1.0,
                "alpha": 1.0 if thick else 0.75,
            }
            _draw(axes, line, results.column, where, style, band=thick)
        goal = results.goal(batch)
        if goal is not None:
            axes.axhline(goal, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
    zoom(panels[0], results, [value for line in lines for value in line.ends(results.column)])
    panels[0].set_title(f"Test {results.metric}, batch {batch}, {results.full(batch)} steps")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8.5)
    return figure


def _draw(axes: Axes, line: Line, column: int, where: Any, style: dict[str, Any], band: bool) -> None:
    """Draw a line's median, and its range if asked for."""
    runs = [run.points for run in line.finals if run.points]
    if not runs:
        return
    columns = list(zip(*runs))
    x = [median(where(point) for point in some) for some in columns]
    values = [[point[column] for point in some if point[column] is not None] or [math.nan] for some in columns]
    axes.plot(x, [median(row) for row in values], label=line.name, **style)
    if band:
        low, high = [min(row) for row in values], [max(row) for row in values]
        axes.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)


def losses(results: Comparison, batch: str) -> Figure:
    """The loss of each step's batch, medians over seeds, on a logarithmic scale."""
    figure = Figure(figsize=(5.2, 3.9), layout="constrained")
    axes, styles = figure.subplots(), looks(results)
    for line in results.at(batch):
        if line.steps != results.full(batch):
            continue
        runs = [run.losses for run in line.finals if not run.diverged]
        rows = [[value for value in row if value is not None] for row in zip(*runs)]
        shown = [median(row) if row else math.nan for row in rows]
        style = {"color": styles[line.name]["color"], "linewidth": 1.2}
        axes.plot(range(1, len(shown) + 1), shown, **style)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_title(f"Training loss, batch {batch}")
    return figure


def tuning(results: Comparison, batch: str) -> Figure:
    """What tuning tried at one size of batch: held-out loss by learning rate, filled for all steps, hollow for half of
    them; the ring was chosen for all steps.
    """
    names = [name for name in results.names if results.at(batch, name)]
    across = min(5, len(names))
    down = math.ceil(len(names) / across)
    figure = Figure(figsize=(10.4, 2.1 * down + 0.4), layout="constrained")
    panels = np.asarray(figure.subplots(down, across, sharey=True, squeeze=False)).flatten()
    styles, seen = looks(results), []
    for axes, name in zip(panels, names):
        for line in results.at(batch, name):
            seen += _tried(axes, line, styles[name]["color"], line.steps == results.full(batch))
        axes.set_title(name, fontsize=9)
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(labelsize=7.5)
    for axes in panels[len(names) :]:
        axes.axis("off")
    if seen:
        low, high = min(seen), float(np.quantile(seen, 0.8))
        panels[0].set_ylim(low - 0.08 * (high - low) - 1e-3, high + 0.3 * (high - low) + 1e-3)
    figure.supxlabel("learning rate", fontsize=9)
    figure.supylabel("held-out loss", fontsize=9)
    return figure


def _tried(axes: Axes, line: Line, shade: str, full: bool) -> list[float]:
    points = [(one["values"]["lr"], _mean(run["loss"] for run in one["runs"])) for one in line.tried]
    kept = [(rate, loss) for rate, loss in points if loss is not None]
    if kept:
        style = {"color": shade, "markersize": 4.5, "alpha": 0.9, "markerfacecolor": shade if full else "none"}
        axes.plot(*zip(*kept), "o", **style)
    chosen = next((loss for (_, loss), one in zip(points, line.tried) if one["values"] == line.values), None)
    if chosen is not None and full:
        axes.scatter([line.values["lr"]], [chosen], s=100, facecolors="none", edgecolors=INK, linewidths=1.2, zorder=5)
    return [loss for _, loss in kept]


def _mean(values: Iterable[float | None]) -> float | None:
    listed = list(values)
    known = [value for value in listed if value is not None]
    return sum(known) / len(known) if known and len(known) == len(listed) else None


def stages(results: Comparison, batch: str) -> Figure:
    """Where a step's time goes at one size of batch: means over the steps of a run, medians over seeds, stacked."""
    lines = [line for line in results.at(batch) if line.steps == results.full(batch)]
    figure = Figure(figsize=(5.2, 3.9), layout="constrained")
    axes = figure.subplots()
    found = [_stage_seconds(line.finals) for line in lines]
    names = [name for name in STAGES if any(name in one for one in found)]
    names += sorted({name for one in found for name in one} - set(names))
    left = np.zeros(len(lines))
    for name in names:
        widths = np.array([1e3 * one.get(name, 0.0) for one in found])
        axes.barh(range(len(lines)), widths, left=left, height=0.6, color=STAGES.get(name, "#BBBBBB"), label=name)
        left += widths
    axes.set_yticks(range(len(lines)), [line.name for line in lines], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("milliseconds a step")
    axes.set_title(f"Where a step's time goes, batch {batch}")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _stage_seconds(finals: list[Final]) -> dict[str, float]:
    names = dict.fromkeys(name for run in finals for name in run.stages)
    return {name: median(run.stages.get(name, 0.0) for run in finals) for name in names}
