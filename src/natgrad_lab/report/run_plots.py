"""The figures of runs' pages, each a function of logs alone; None where no run tells what it would show.

A colour is a recipe; runs of one recipe that differ in their seeds alone share it. Of long runs, lines are means over
neighbouring steps and light bands their range.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from natgrad_lab.report.interval_heatmap import heat
from natgrad_lab.report.runs import Log
from natgrad_lab.report.style import COLOURS, STAGES

POINTS = 300
"""Points of a line at most."""
TRAFFIC = {"gradients": "#0072B2", "weights": "#56B4E9", "statistics": "#E69F00", "inverses": "#D55E00"}
PALETTE = (*COLOURS[3:], *COLOURS[:3])

Line = dict[str, Any]
Place = Callable[[Line], float]


def shade(logs: list[Log], log: Log) -> str:
    """Return a run's colour: that of its recipe, whatever the seed."""
    recipes = list(dict.fromkeys(_recipe(other) for other in logs))
    return COLOURS[recipes.index(_recipe(log)) % len(COLOURS)]


def dashes(logs: list[Log], log: Log) -> Any:
    """Return a run's kind of line, which tells it from others of its colour."""
    alike = [other for other in logs if shade(logs, other) == shade(logs, log)]
    return ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.5, 1.5)))[alike.index(log) % 4]


def _recipe(log: Log) -> str:
    return repr((log.about["name"], sorted((k, repr(v)) for k, v in log.fields.items() if k != "seed")))


def progress(logs: list[Log]) -> Figure | None:
    """Loss and test accuracy: by step, and of several runs by epoch and time as well."""
    if not any(log.steps for log in logs):
        return None
    unit, seconds = _unit(max(log.elapsed for log in logs))
    places: list[tuple[str, Place]] = [("step", lambda line: line["step"])]
    if len(logs) > 1:
        places.append(("epoch", lambda line: line.get("epoch", math.nan)))
        places.append((f"{unit} of training", lambda line: line.get("elapsed", math.nan) / seconds))
    rows = 1 if len(logs) == 1 else 2
    figure = Figure(figsize=(10.4, 3.7 if rows == 1 else 6.4), layout="constrained")
    grid = np.asarray(figure.subplots(rows, 2 if rows == 1 else 3, squeeze=False))
    figure.set_layout_engine("constrained", h_pad=0.1)
    losses, scores = (grid[0][:1], grid[0][1:]) if rows == 1 else (grid[0], grid[1])
    for axes, place in zip(losses, places):
        _losses(axes, logs, *place)
    for axes, place in zip(scores, places):
        _scores(axes, logs, *place)
    losses[0].legend(fontsize=8)
    return figure


def _losses(axes: Axes, logs: list[Log], label: str, where: Place) -> None:
    for log in logs:
        name = log.label if len(logs) > 1 else "each batch"
        _draw(axes, log.steps, where, _value("loss"), name, shade(logs, log), dashes(logs, log))
        if len(logs) == 1:
            points = [(where(line), line.get("test_loss")) for line in log.evaluations]
            style: dict[str, Any] = {"color": COLOURS[1], "marker": "o", "markersize": 3, "label": "test images"}
            axes.plot([x for x, _ in points], [math.nan if y is None else y for _, y in points], **style)
    told = [line["loss"] for log in logs for line in log.steps if line.get("loss")]
    if told and min(told) > 0 and max(told) > 20 * min(told):
        axes.set_yscale("log")
    axes.set_title(f"{'Loss' if len(logs) == 1 else 'Training loss'} by {_short(label)}")
    _by(axes, label)


def _scores(axes: Axes, logs: list[Log], label: str, where: Place) -> None:
    for log in logs:
        points = [(where(line), line["test_accuracy"]) for line in log.evaluations if line.get("test_accuracy")]
        style: dict[str, Any] = {"marker": "o", "markersize": 3 if len(points) < 60 else 0}
        style |= {"color": shade(logs, log), "linestyle": dashes(logs, log)}
        axes.plot([x for x, _ in points], [y for _, y in points], **style)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(f"Test accuracy by {_short(label)}")
    _by(axes, label)


def numbers(logs: list[Log]) -> Figure | None:
    """Small multiples by step: learning rate, damping, statistics refreshed, lengths of steps, memory, speed."""
    shown: list[tuple[str, Place]] = [
        ("Learning rate", _value("lr")),
        ("Damping", _value("damping")),
        ("Refreshed, %, mean of 10 steps", _value("refreshed", 100)),
        ("Step as made, % of lr times direction", _value("factor", 100)),
        ("Predicted change of outputs, 2 KL", _value("change")),
        ("Curvature, shown over predicted", _value("ratio")),
        ("Noise scale of the gradient, samples", _value("noise_scale")),
        ("Memory of rank 0, GB", _value("memory", 1e-9)),
        ("Images a second", _value("images_per_second")),
    ]
    shown = [
        (title, value) for title, value in shown if any(math.isfinite(value(s)) for log in logs for s in log.steps)
    ]
    if not shown:
        return None
    rows = -(-len(shown) // 3)
    figure = Figure(figsize=(10.4, 2.5 * rows), layout="constrained")
    grid = np.asarray(figure.subplots(rows, 3, squeeze=False)).flatten()
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    figure.set_layout_engine("constrained", h_pad=0.1)
    for axes, (title, value) in zip(grid, shown):
        for log in logs:
            style = log.label, shade(logs, log), dashes(logs, log)
            smooth = 10 if "10 steps" in title else 1
            _draw(axes, log.steps, lambda line: line["step"], value, *style, smooth=smooth)
        axes.set_title(title)
        _by(axes, "step")
        axes.set_ylim(bottom=0)
    return figure


def stages(logs: list[Log], wide: bool = False) -> Figure | None:
    """Where a step's time goes: stacked by step for one run, one bar a run for several."""
    parts = [[line.get("stages", {}) for line in log.steps] for log in logs]
    ordered = [*STAGES, *sorted({name for run in parts for part in run for name in part} - {*STAGES})]
    colours = {**{name: PALETTE[k % len(PALETTE)] for k, name in enumerate(ordered)}, **STAGES}
    return _stacks(logs, parts, ordered, colours, "Step time by stage", "milliseconds", 1e3, wide)


def traffic(logs: list[Log]) -> Figure | None:
    """What rank 0 sends in a step, by kind."""
    parts = [[line.get("traffic", {}) for line in log.steps] for log in logs]
    ordered = [*TRAFFIC, *sorted({name for run in parts for part in run for name in part} - {*TRAFFIC})]
    colours = {**{name: PALETTE[k % len(PALETTE)] for k, name in enumerate(ordered)}, **TRAFFIC}
    return _stacks(logs, parts, ordered, colours, "Sent by rank 0 in a step", "MB", 1e-6)


def _stacks(
    logs: list[Log],
    parts: list[list[dict[str, float]]],
    ordered: list[str],
    colours: dict[str, str],
    title: str,
    unit: str,
    scale: float,
    wide: bool = False,
) -> Figure | None:
    """Draw amounts by kind: [run][step][kind]."""
    kinds = [name for name in ordered if any(part.get(name) for run in parts for part in run)]
    if not kinds:
        return None
    width = 10.4 if wide else 5.2
    figure = Figure(figsize=(width, 3.6 if len(logs) == 1 else 1.9 + 0.32 * len(logs)), layout="constrained")
    axes = figure.subplots()
    if len(logs) == 1:
        x = _bins([line["step"] for line in logs[0].steps], POINTS // 3)[0]
        y = [scale * _bins([part.get(name, 0.0) for part in parts[0]], POINTS // 3)[0] for name in kinds]
        axes.stackplot(x, *y, colors=[colours[name] for name in kinds], labels=kinds, linewidth=0)
        axes.set_ylim(0, 1.15 * float(np.quantile(np.sum(y, axis=0), 0.98)) or None)  # the first step is often long
        axes.set_ylabel(unit)
        _by(axes, "step")
    else:
        left = np.zeros(len(logs))
        for name in kinds:
            mean = [scale * sum(part.get(name, 0.0) for part in run) / max(len(run), 1) for run in parts]
            axes.barh(range(len(logs)), mean, left=left, height=0.55, color=colours[name], label=name)
            left += mean
        axes.set_yticks(range(len(logs)), [log.label for log in logs], fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"{unit} per step, means")
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=8 if wide else 4, fontsize=8.5)
    return figure


def intervals(log: Log) -> Figure | None:
    """Steps for which each statistic is kept."""
    told = [(line["step"], line["intervals"]) for line in log.steps if line.get("intervals")]
    if not told:
        return None
    title = f"Steps from one measurement to the next: {log.label}"
    return heat([ages for _, ages in told], title, [step for step, _ in told])


def _draw(
    axes: Axes, lines: list[Line], where: Place, value: Place, label: str, colour: str, dash: Any, smooth: int = 1
) -> None:
    """Draw a line over steps, its range where several steps make a point; each the mean of the last `smooth`."""
    x, *_ = _bins([where(line) for line in lines])
    told = np.array([value(line) for line in lines])
    if smooth > 1 and len(told) and np.isfinite(told).all():
        sums = np.cumsum(np.insert(told, 0, 0.0))
        first = np.maximum(np.arange(1, len(sums)) - smooth, 0)
        told = (sums[1:] - sums[first]) / (np.arange(1, len(sums)) - first)
    mean, low, high = _bins(told)
    axes.plot(x, mean, color=colour, linestyle=dash, linewidth=1.5, label=label)
    if len(lines) > POINTS:
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _bins(values: Any, most: int = POINTS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return means, least and largest of at most so many equal groups of neighbours; NaN where a group has none."""
    groups = [
        group[np.isfinite(group)] for group in np.array_split(np.array(values, float), min(most, max(len(values), 1)))
    ]
    found = [(g.mean(), g.min(), g.max()) if len(g) else (math.nan,) * 3 for g in groups]
    mean, low, high = np.array(found).T
    return mean, low, high


def _value(name: str, scale: float = 1.0) -> Place:
    """Return a reader of one number of a line, NaN where it is not there."""

    def read(line: Line) -> float:
        value = line.get(name)
        return scale * value if isinstance(value, int | float) else math.nan

    return read


def _unit(seconds: float) -> tuple[str, float]:
    return ("seconds", 1.0) if seconds < 300 else ("minutes", 60.0) if seconds < 3 * 3600 else ("hours", 3600.0)


def _short(label: str) -> str:
    return "time" if label.endswith("training") else label


def _by(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    if label == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
