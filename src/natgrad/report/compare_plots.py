"""The figures of a comparison, each a function of its lines alone. Lines are medians over seeds.

An optimizer has one colour and mark everywhere: blues and greys are first-order, greens Muon, Shampoo and SOAP, warm
ones natgrad.
"""

import math
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from natgrad.report.compare_read import Comparison, Final, Line
from natgrad.report.style import INK

COLOURS = {
    "first-order": ("#08519C", "#3182BD", "#6BAED6", "#7A7A7A", "#B0B0B0"),
    "matrix": ("#006D2C", "#41AB5D", "#A1D99B"),
    "natgrad": ("#D55E00", "#E69F00", "#B2182B", "#CC79A7", "#8C6D00", "#762A83"),
}
MARKS = "osD^vP"


def looks(results: Comparison) -> dict[str, dict[str, Any]]:
    """Return each optimizer's colour and mark."""
    found: dict[str, dict[str, Any]] = {}
    seen: dict[str, int] = {}
    for name in results.names:
        kind = next(line.kind for line in results.lines if line.name == name)
        place = seen[kind] = seen.get(kind, -1) + 1
        shades = COLOURS[kind]
        width = 1.9 if kind == "natgrad" else 1.4
        found[name] = {
            "color": shades[place % len(shades)],
            "marker": MARKS[place % len(MARKS)],
            "markersize": 5,
            "linewidth": width,
        }
    return found


def scaling(results: Comparison) -> Figure | None:
    """Steps to each target against the size of a batch: where a line stops falling, larger batches stop helping."""
    if len(results.batches) < 2:
        return None
    targets: list[tuple[str, Callable[[str], float | None]]] = [
        ("the best first-order optimizer's end at that batch", results.goal),
        *((f"{results.metric} {results.text(target)}", lambda batch, t=target: t) for target in results.targets),
    ]
    count = len(targets)
    figure = Figure(figsize=(10.4, 4.3 * math.ceil(count / 2)), layout="constrained")
    panels = np.asarray(figure.subplots(math.ceil(count / 2), 2, squeeze=False)).flatten()
    for axes, (title, target) in zip(panels, targets):
        _steps_to(axes, results, target)
        axes.set_title(f"Steps to {title}")
    for axes in panels[count:]:
        axes.axis("off")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=7, fontsize=8.5)
    return figure


def _steps_to(axes: Axes, results: Comparison, target: Callable[[str], float | None]) -> None:
    sizes = [results.samples(batch) for batch in results.batches]
    most = max(results.full(batch) for batch in results.batches)
    found = {
        name: [
            results.fewest(batch, name, target(batch))[0] if results.at(batch, name) else math.inf
            for batch in results.batches
        ]
        for name in results.names
    }
    never = 1.6 * most
    styles = looks(results)
    for name, values in found.items():
        shown = [value if math.isfinite(value) else math.nan for value in values]
        axes.plot(sizes, shown, label=name, **styles[name])
    missed = {
        size: [name for name, values in found.items() if not math.isfinite(values[place])]
        for place, size in enumerate(sizes)
    }
    for size, names in missed.items():
        for place, name in enumerate(names):
            axes.plot(
                size, never * 1.13**place, marker="x", color=styles[name]["color"], markersize=5, linestyle="none"
            )
    if any(missed.values()):
        axes.axhline(1.3 * most, color="#CCCCCC", linewidth=0.8)
        axes.annotate(
            "never", (sizes[0], 1.33 * most), (-22, 2), textcoords="offset points", fontsize=8, color="#777777"
        )
    finite = [values[0] for values in found.values() if math.isfinite(values[0])]
    if finite:
        least = min(finite)
        ideal = [least * sizes[0] / size for size in sizes]
        axes.plot(sizes, ideal, color="#999999", linewidth=1, linestyle=(0, (2, 3)))
        axes.set_ylim(bottom=max(0.8, 0.7 * min(v for values in found.values() for v in values if math.isfinite(v))))
    axes.set_yscale("log")
    _by_batch(axes, results, sizes)


def _by_batch(axes: Axes, results: Comparison, sizes: list[int]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([batch if batch != "full" else f"full\n{results.samples(batch)}" for batch in results.batches])
    axes.set_xlabel("samples in a batch")


def ends(results: Comparison) -> Figure | None:
    """Where everyone ends, against the size of a batch: all steps, and half of them."""
    if len(results.batches) < 2:
        return None
    figure = Figure(figsize=(10.4, 3.9), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    sizes, styles = [results.samples(batch) for batch in results.batches], looks(results)
    values: list[float] = []
    for axes, place, title in zip(panels, (0, -1), ("after all steps", "after half of the steps, tuned for them")):
        for name in results.names:
            lines = [results.at(batch, name) for batch in results.batches]
            shown = [_number(some[place].end(results.column)) if some else math.nan for some in lines]
            axes.plot(sizes, shown, label=name, **styles[name])
            values += [value for value in shown if math.isfinite(value)]
        axes.set_title(f"Test {results.metric} {title}")
        _by_batch(axes, results, sizes)
    _zoom(panels[0], results, values)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8.5)
    return figure


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _zoom(axes: Axes, results: Comparison, values: list[float]) -> None:
    """Show where most lie, and leave out what fails."""
    if not values:
        return
    if results.metric == "accuracy":
        low, high = float(np.quantile(values, 0.15)), max(values)
        axes.set_ylim(max(0.0, low - 0.6 * (high - low) - 0.02), min(1.0, high + 0.01))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    else:
        low, high = min(values), float(np.quantile(values, 0.85))
        axes.set_ylim(low - 0.05 * (high - low) - 0.01, high + 0.6 * (high - low) + 0.02)


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
    _zoom(panels[0], results, [value for line in lines for value in line.ends(results.column)])
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
    """What tuning tried at one size of batch, with all steps: held-out loss by learning rate; the ring was chosen."""
    lines = [line for line in results.at(batch) if line.steps == results.full(batch)]
    across = min(5, len(lines))
    down = math.ceil(len(lines) / across)
    figure = Figure(figsize=(10.4, 2.1 * down + 0.4), layout="constrained")
    panels = np.asarray(figure.subplots(down, across, sharey=True, squeeze=False)).flatten()
    styles, seen = looks(results), []
    for axes, line in zip(panels, lines):
        seen += _tried(axes, line, styles[line.name]["color"])
        axes.set_title(line.name, fontsize=9)
        axes.set_xscale("log")
        axes.tick_params(labelsize=7.5)
    for axes in panels[len(lines) :]:
        axes.axis("off")
    if seen:
        low, high = min(seen), float(np.quantile(seen, 0.8))
        panels[0].set_ylim(low - 0.08 * (high - low) - 1e-3, high + 0.3 * (high - low) + 1e-3)
    figure.supxlabel("learning rate (SENG: over the damping)", fontsize=9)
    figure.supylabel("held-out loss", fontsize=9)
    return figure


def _tried(axes: Axes, line: Line, shade: str) -> list[float]:
    key = "ratio" if "ratio" in line.values else "lr"
    points = [(one["values"][key], _mean(run["loss"] for run in one["runs"])) for one in line.tried]
    kept = [(rate, loss) for rate, loss in points if loss is not None]
    axes.plot(*zip(*kept), "o", color=shade, markersize=4, alpha=0.8) if kept else None
    chosen = next((loss for (rate, loss), one in zip(points, line.tried) if one["values"] == line.values), None)
    if chosen is not None:
        axes.scatter([line.values[key]], [chosen], s=90, facecolors="none", edgecolors=INK, linewidths=1.2, zorder=5)
    return [loss for _, loss in kept]


def _mean(values: Iterable[float | None]) -> float | None:
    listed = list(values)
    known = [value for value in listed if value is not None]
    return sum(known) / len(known) if known and len(known) == len(listed) else None


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
