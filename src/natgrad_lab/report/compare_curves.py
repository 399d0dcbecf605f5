"""The pictures of a comparison at one size of batch: curves, losses, what tuning tried, where a step's time goes."""

import math
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from natgrad_lab.report.compare_plots import COLOURS, DOTTED, keys, looks, zoom
from natgrad_lab.report.compare_read import Comparison, Final, Line
from natgrad_lab.report.drawing import Key, Picture, Plot, logarithmic, name
from natgrad_lab.report.style import INK, STAGES

POINTS = 300
"""Points of a line at most."""
OTHER = "#BBBBBB"


def full_lines(results: Comparison, batch: str) -> list[Line]:
    """Return the lines at a size of batch that had all steps."""
    return [line for line in results.at(batch) if line.steps == results.full(batch)]


def curves(results: Comparison, batch: str) -> Picture:
    """The metric by step, by epoch and by time at one size of batch; thick: the best of each kind."""
    lines = full_lines(results, batch)
    best = [results.best([line for line in lines if line.kind == kind]) for kind in COLOURS]
    samples, of = lines[0].samples, lines[0].of
    places: tuple[tuple[str, Callable[[list[float]], float]], ...] = (
        ("step", lambda point: point[0]),
        ("epoch", lambda point: point[0] * samples / of),
        ("seconds of training", lambda point: point[1]),
    )
    values, styles = [value for line in lines for value in line.ends(results.column)], looks(results)
    goal = results.goal(batch)

    def drawing(label: str, where: Callable[[list[float]], float]) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for line in lines:
                thick = any(line is one for one in best)
                style = {"color": styles[line.name]["color"], "linewidth": 2.4 if thick else 1.0}
                _draw(axes, line, results.column, where, {**style, "alpha": 1.0 if thick else 0.75}, band=thick)
            if goal is not None:
                axes.axhline(goal, color=INK, linewidth=0.9, linestyle=DOTTED)
            axes.set_xlabel(label)
            axes.set_xlim(left=0)
            zoom(axes, results, values)

        return draw

    here = {line.name for line in lines}
    legend = [key for key in keys(results, marked=False) if key.label in here]
    legend += [Key("thick: best of its kind", INK, width=3.2), Key("range over seeds", "#999999", "area", line=False)]
    if goal is not None:
        legend.append(Key("goal", INK, dash=DOTTED, width=1.2))
    plots = [Plot(f"By {label.split()[0]}", drawing(label, where)) for label, where in places]
    return Picture(plots, legend)


def _draw(axes: Axes, line: Line, column: int, where: Any, style: dict[str, Any], band: bool) -> None:
    """Draw a line's median, and its range if asked for."""
    runs = [run.points[:: -(-len(run.points) // POINTS)] for run in line.finals if run.points]
    if not runs:
        return
    columns = list(zip(*runs))
    x = [median(where(point) for point in some) for some in columns]
    values = [[point[column] for point in some if point[column] is not None] or [math.nan] for some in columns]
    axes.plot(x, [median(row) for row in values], marker="o" if len(x) < 2 else "none", markersize=3, **style)
    if band:
        low, high = [min(row) for row in values], [max(row) for row in values]
        axes.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)


def losses(results: Comparison, batch: str) -> Picture:
    """The loss of each step's batch, medians over seeds, on a logarithmic scale."""
    lines = full_lines(results, batch)

    def draw(axes: Axes) -> None:
        styles = looks(results)
        for line in lines:
            runs = [run.losses for run in line.finals if run.diverged is None]
            rows = [[value for value in row if value is not None] for row in zip(*runs)]
            shown = [median(row) if row else math.nan for row in rows]
            steps = range(1, len(shown) + 1)
            every = -(-len(shown) // (4 * POINTS)) or 1
            style = {"color": styles[line.name]["color"], "linewidth": 1.2}
            axes.plot(steps[::every], shown[::every], marker="o" if len(shown) < 2 else "none", markersize=3, **style)
        logarithmic(axes.yaxis)
        axes.set_xlabel("step")

    here = {line.name for line in lines}
    legend = [key for key in keys(results, marked=False) if key.label in here]
    return Picture([Plot("", draw)], legend, "half")


def tuning(results: Comparison, batch: str) -> Picture | None:
    """What tuning tried at one size of batch: held-out loss by learning rate, filled for all steps, hollow for half of
    them; the ring was chosen for all steps.
    """
    names = [name for name in results.names if results.at(batch, name)]
    points = {one: [_tried(line) for line in results.at(batch, one)] for one in names}
    seen = [loss for lines in points.values() for line in lines for _, loss in line]
    if not seen:
        return None
    best = [min(losses) for lines in points.values() if (losses := [loss for line in lines for _, loss in line])]
    low, high = min(seen), max(float(np.quantile(seen, 0.8)), *best)  # the best of everyone is seen
    limits = (low - 0.08 * (high - low) - 1e-3, high + 0.3 * (high - low) + 1e-3)
    styles = looks(results)

    def drawing(one: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for line, tried in zip(results.at(batch, one), points[one]):
                _dots(axes, line, tried, styles[one]["color"], line.steps == results.full(batch))
            logarithmic(axes.xaxis)
            axes.set_xlabel("learning rate")
            axes.set_ylim(*limits)

        return draw

    legend = [Key("tried with all steps", INK, "o", line=False), Key("with half of them", INK, "hollow", line=False)]
    legend.append(Key("chosen for all steps", INK, "ring", line=False))
    return Picture([Plot(name(one), drawing(one)) for one in names], legend, height=2.0)


def _tried(line: Line) -> list[tuple[float, float]]:
    """Return learning rates above 0 and mean held-out losses of what was tried, those that did not diverge."""
    found = [(one["values"].get("lr"), _mean(run["loss"] for run in one["runs"])) for one in line.tried]
    known = [(rate, loss) for rate, loss in found if loss is not None and isinstance(rate, int | float)]
    return [(float(rate), loss) for rate, loss in known if rate > 0]


def _dots(axes: Axes, line: Line, tried: list[tuple[float, float]], shade: str, full: bool) -> None:
    if not tried:
        return
    style = {"color": shade, "markersize": 4.5, "alpha": 0.9, "markerfacecolor": shade if full else "none"}
    axes.plot(*zip(*tried), "o", **style)
    chosen = next((one for one in line.tried if one["values"] == line.values), None)
    loss = None if chosen is None else _mean(run["loss"] for run in chosen["runs"])
    rate = line.values.get("lr")
    if full and loss is not None and isinstance(rate, int | float) and rate > 0:
        axes.scatter([rate], [loss], s=100, facecolors="none", edgecolors=INK, linewidths=1.2, zorder=5)


def _mean(values: Iterable[float | None]) -> float | None:
    listed = list(values)
    known = [value for value in listed if value is not None]
    return sum(known) / len(known) if known and len(known) == len(listed) else None


def stages(results: Comparison, batch: str) -> Picture | None:
    """Where a step's time goes at one size of batch: means over the steps of a run, medians over seeds, stacked."""
    lines = full_lines(results, batch)
    found = [_stage_seconds(line.finals) for line in lines]
    names = [stage for stage in STAGES if any(stage in one for one in found)]
    new = sorted({stage for one in found for stage in one} - set(names))
    colours = {stage: STAGES.get(stage, OTHER) for stage in names + new}
    if not colours:
        return None

    def draw(axes: Axes) -> None:
        left = np.zeros(len(lines))
        for stage, colour in colours.items():
            widths = np.array([1e3 * one.get(stage, 0.0) for one in found])
            axes.barh(range(len(lines)), widths, left=left, height=0.6, color=colour)
            left += widths
        axes.set_yticks(range(len(lines)), [name(line.name) for line in lines], fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("milliseconds a step")

    legend = [Key(stage, colour, "area", line=False) for stage, colour in colours.items()]
    return Picture([Plot("", draw)], legend, "half", max(2.2, 1.1 + 0.24 * len(lines)))


def _stage_seconds(finals: list[Final]) -> dict[str, float]:
    names = dict.fromkeys(name for run in finals for name in run.stages)
    return {name: median(run.stages.get(name, 0.0) for run in finals) for name in names}
