"""The pictures of runs' pages, each a function of logs alone; None where no run tells what it would show.

A colour is a recipe; runs of one recipe that differ in their seeds alone share it. Of long runs, lines are means over
neighbouring steps and light bands their range.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from natgrad_lab.report.drawing import Key, Picture, Plot, logarithmic, name
from natgrad_lab.report.interval_heatmap import heat
from natgrad_lab.report.runs import Log
from natgrad_lab.report.style import COLOURS, STAGES

POINTS = 300
"""Points of a line at most."""
KINDS = 12
"""Kinds of a stack at most; the smallest of more are added up."""
ROWS = 512
"""Statistics of a heat map at most."""
TRAFFIC = {"gradients": "#0072B2", "weights": "#56B4E9", "statistics": "#E69F00", "inverses": "#D55E00"}
PALETTE = (*COLOURS[3:], *COLOURS[:3])
OTHERS = "others"
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.5, 1.5)))
BESIDE = (0, (4, 2))
"""How a bound is drawn beside what it bounds."""

Line = dict[str, Any]
Place = Callable[[Line], float]


def shade(logs: list[Log], log: Log) -> str:
    """Return a run's colour: that of its recipe, whatever the seed."""
    recipes = list(dict.fromkeys(_recipe(other) for other in logs))
    return COLOURS[recipes.index(_recipe(log)) % len(COLOURS)]


def dashes(logs: list[Log], log: Log) -> Any:
    """Return a run's kind of line, which tells it from others of its colour."""
    alike = [other for other in logs if shade(logs, other) == shade(logs, log)]
    return DASHES[alike.index(log) % 4]


def _recipe(log: Log) -> str:
    return repr((log.name, sorted((k, repr(v)) for k, v in log.fields.items() if k != "seed")))


def _keys(logs: list[Log]) -> list[Key]:
    """Return what tells runs apart; nothing where there is one."""
    if len(logs) == 1:
        return []
    return [Key(log.label, shade(logs, log), dash=dashes(logs, log)) for log in logs]


def _band(logs: list[Log]) -> list[Key]:
    """Return what a band is, where lines have one."""
    long = any(len(log.steps) > POINTS for log in logs)
    return [Key("light band: range of neighbouring steps", "#999999", "area", line=False)] if long else []


def progress(logs: list[Log]) -> Picture | None:
    """Loss and test accuracy: by step, and of several runs by epoch and time as well."""
    if not any(log.steps for log in logs):
        return None
    unit, seconds = _unit(max(log.elapsed for log in logs))
    places: list[tuple[str, Place]] = [("step", lambda line: line["step"])]
    if len(logs) > 1:
        places.append(("epoch", _value("epoch")))
        places.append((f"{unit} of training", _value("elapsed", 1 / seconds)))
    plots = [Plot(_by_what("Loss" if len(logs) == 1 else "Training loss", p), _losses(logs, *p)) for p in places]
    plots += [Plot(_by_what("Test accuracy", p), _scores(logs, *p)) for p in places]
    keys = _keys(logs)
    if len(logs) == 1:
        keys = [Key("each batch of training", COLOURS[0]), Key("test samples", COLOURS[1], "o")]
    return Picture(plots, keys + _band(logs), "half" if len(logs) == 1 else "third")


def _by_what(what: str, place: tuple[str, Place]) -> str:
    return f"{what} by {'time' if place[0].endswith('training') else place[0]}"


def _losses(logs: list[Log], label: str, where: Place) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for log in logs:
            _draw(axes, log.steps, where, _value("loss"), shade(logs, log), dashes(logs, log))
            if len(logs) == 1:
                _points(axes, log.evaluations, where, _value("test_loss"), COLOURS[1], "-")
        told = [line["loss"] for log in logs for line in log.steps if line.get("loss")]
        if told and min(told) > 0 and max(told) > 20 * min(told):
            logarithmic(axes.yaxis)
        _by(axes, label)

    return draw


def _scores(logs: list[Log], label: str, where: Place) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for log in logs:
            colour = COLOURS[1] if len(logs) == 1 else shade(logs, log)
            _points(axes, log.evaluations, where, _value("test_accuracy"), colour, dashes(logs, log))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        _by(axes, label)

    return draw


def _points(axes: Axes, lines: list[Line], where: Place, value: Place, colour: str, dash: Any) -> None:
    """Draw what was measured at some steps; nothing where no value is known."""
    points = [(where(line), value(line)) for line in lines if math.isfinite(value(line))]
    if points:
        x, y = (_bins(column)[0] for column in zip(*points))
        axes.plot(x, y, color=colour, linestyle=dash, marker="o", markersize=3 if len(points) < 60 else 0)


@dataclass(frozen=True)
class Number:
    """One number of every step: its title, what it means, how it is read, what stands beside it as a dashed line."""

    title: str
    value: Place
    note: str = ""
    beside: Place | None = None
    smooth: int = 1


def numbers(logs: list[Log]) -> Picture | None:
    """Small plots by step: what the schedules set, what was measured, how steps were shortened, what they cost."""
    shown = [
        Number("Learning rate", _value("lr")),
        Number("Damping", _value("damping"), "Added to the curvature before it is inverted."),
        Number(
            "Statistics measured, %",
            _value("refreshed", 100),
            "Share of all statistics of the curvature that a step measures; mean of 10 steps.",
            smooth=10,
        ),
        Number(
            "Weights preconditioned, %",
            _value("preconditioned", 100),
            "Share of the weights of layers with a curvature whose direction it made. The rest takes the fallback.",
        ),
        Number(
            "Length of the step, %",
            _value("factor", 100),
            "100: learning rate times direction. Below: the step was shortened to stay within the bound.",
        ),
        Number(
            "Change of the outputs",
            _value("change"),
            "Twice the KL divergence (nats) that the curvature predicts for the step. Dashed: the bound.",
            _value("bound"),
        ),
        Number(
            "Curvature, measured over predicted",
            _value("ratio"),
            "Above 1: gradients have changed faster along the steps than the curvature predicts.",
        ),
        Number(
            "Noise scale of the gradient, samples",
            _value("noise_scale"),
            "The batch at which the gradient's noise equals its signal. Batches far above it save few steps."
            + (" Dashed: the batch." if len(logs) == 1 else ""),
            _batch(logs[0]) if len(logs) == 1 else None,
        ),
        Number("Steps skipped so far", _counted(logs, "skipped"), "Their gradients were not finite."),
        Number(
            "Statistics dropped so far",
            _counted(logs, "dropped"),
            "They were not finite or not the layer's own; the layer kept what it had. On rank 0.",
        ),
        Number(
            "Factorisations retried so far",
            _counted(logs, "retries"),
            "They needed more damping than was asked for. On rank 0.",
        ),
        Number("Memory of rank 0, GB", _value("memory", 1e-9)),
        Number("Images a second", _value("images_per_second")),
    ]
    shown = [one for one in shown if any(math.isfinite(one.value(line)) for log in logs for line in log.steps)]
    plots = [Plot(one.title, _small(logs, one), one.note) for one in shown]
    return Picture(plots, _keys(logs) + _band(logs)) if plots else None


def _batch(log: Log) -> Place:
    """Return the recipe's batch, where it stays the same."""
    batch, steady = log.fields.get("batch"), log.fields.get("batch_schedule.kind") in (None, "Constant")
    value = float(batch) if isinstance(batch, int) and 0 < batch < 2**53 and steady else math.nan
    return lambda line: value


def _counted(logs: list[Log], name: str) -> Place:
    """Return a count, where it is above 0 at all."""
    read = _value(name)
    some = any(read(line) > 0 for log in logs for line in log.steps)
    return read if some else lambda line: math.nan


def _small(logs: list[Log], one: Number) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for log in logs:
            look = shade(logs, log), dashes(logs, log)
            _draw(axes, log.steps, lambda line: line["step"], one.value, *look, smooth=one.smooth)
            if one.beside is not None:
                colour = COLOURS[1] if len(logs) == 1 else look[0]
                _draw(axes, log.steps, lambda line: line["step"], one.beside, colour, BESIDE, width=1.2)
        _by(axes, "step")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0] if axes.dataLim.y0 < 0 else 0.0))

    return draw


def stages(logs: list[Log], wide: bool = False) -> Picture | None:
    """Where a step's time goes: stacked by step for one run, one bar a run for several."""
    return _stacks(logs, "stages", STAGES, "milliseconds", 1e3, wide)


def traffic(logs: list[Log]) -> Picture | None:
    """What rank 0 sends in a step, by kind."""
    return _stacks(logs, "traffic", TRAFFIC, "MB", 1e-6, False)


def _stacks(logs: list[Log], key: str, known: dict[str, str], unit: str, scale: float, wide: bool) -> Picture | None:
    """Draw amounts by kind: [run][step][kind]."""
    parts, kinds = _amounts([[line.get(key) or {} for line in log.steps] for log in logs], known)
    if not kinds:
        return None
    new = [kind for kind in kinds if kind not in known]
    colours = known | {kind: PALETTE[place % len(PALETTE)] for place, kind in enumerate(new)}
    keys = [Key(name(kind), colours[kind], "area", line=False) for kind in kinds]
    draw = _areas if len(logs) == 1 else _bars
    height = None if len(logs) == 1 else 1.1 + 0.32 * len(logs)
    plot = Plot("", lambda axes: draw(axes, logs, parts, [(kind, colours[kind]) for kind in kinds], unit, scale))
    return Picture([plot], keys, "full" if wide else "half", height)


def _amounts(parts: list[list[Line]], known: dict[str, str]) -> tuple[list[list[Line]], list[str]]:
    """Return amounts and their kinds, known ones first; of very many kinds the smallest are one."""
    sums: dict[str, float] = {}
    for part in (part for run in parts for part in run):
        for kind, amount in part.items():
            sums[kind] = sums.get(kind, 0.0) + amount
    kinds = [kind for kind in known if sums.get(kind)]
    rest = sorted(kind for kind in sums if kind not in known and sums[kind])
    if len(kinds) + len(rest) <= KINDS:
        return parts, kinds + rest
    kept = sorted(rest, key=lambda kind: -sums[kind])[: KINDS - len(kinds) - 1]
    least = set(rest) - set(kept)
    told = [
        [
            {
                **{k: v for k, v in part.items() if k not in least},
                OTHERS: sum(part.get(k, 0.0) for k in part if k in least),
            }
            for part in run
        ]
        for run in parts
    ]
    return told, [*kinds, *sorted(kept), OTHERS]


def _areas(
    axes: Axes, logs: list[Log], parts: list[list[Line]], kinds: list[tuple[str, str]], unit: str, scale: float
) -> None:
    x = _bins([line["step"] for line in logs[0].steps], POINTS // 3)[0]
    y = [scale * _bins([part.get(kind, 0.0) for part in parts[0]], POINTS // 3)[0] for kind, _ in kinds]
    axes.stackplot(x, *y, colors=[colour for _, colour in kinds], linewidth=0)
    most = 1.15 * float(np.quantile(np.sum(y, axis=0), 0.98))  # the first step is often long
    if most > 0:
        axes.set_ylim(0, most)
    axes.set_ylabel(unit)
    _by(axes, "step")


def _bars(
    axes: Axes, logs: list[Log], parts: list[list[Line]], kinds: list[tuple[str, str]], unit: str, scale: float
) -> None:
    left = np.zeros(len(logs))
    for kind, colour in kinds:
        mean = np.array([scale * sum(part.get(kind, 0.0) for part in run) / max(len(run), 1) for run in parts])
        axes.barh(range(len(logs)), mean, left=left, height=0.55, color=colour)
        left += mean
    axes.set_yticks(range(len(logs)), [name(log.label) for log in logs], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"{unit} per step, means")


def intervals(log: Log) -> Picture | None:
    """Steps for which each statistic is kept."""
    told = [(line["step"], line["intervals"]) for line in log.steps if line.get("intervals")]
    if not told:
        return None
    names = list(dict.fromkeys(name for _, ages in told for name in ages))[:ROWS]
    ages = [{name: ages[name] for name in names if name in ages} for _, ages in told]
    return heat(ages, [step for step, _ in told])


def _draw(
    axes: Axes,
    lines: list[Line],
    where: Place,
    value: Place,
    colour: str,
    dash: Any,
    smooth: int = 1,
    width: float = 1.5,
) -> None:
    """Draw a line over steps, its range where several steps make a point; each the mean of the last `smooth`."""
    x, *_ = _bins([where(line) for line in lines])
    told = np.array([value(line) for line in lines])
    if smooth > 1 and len(told) and np.isfinite(told).all():
        sums = np.cumsum(np.insert(told, 0, 0.0))
        first = np.maximum(np.arange(1, len(sums)) - smooth, 0)
        told = (sums[1:] - sums[first]) / (np.arange(1, len(sums)) - first)
    mean, low, high = _bins(told)
    few = np.isfinite(mean).sum() < 2  # a line through one point is none
    axes.plot(x, mean, color=colour, linestyle=dash, linewidth=width, marker="o" if few else "none", markersize=3)
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


def _value(key: str, scale: float = 1.0) -> Place:
    """Return a reader of one number of a line, NaN where it is not there."""

    def read(line: Line) -> float:
        value = line.get(key)
        return math.nan if value is None else scale * value

    return read


def _unit(seconds: float) -> tuple[str, float]:
    return ("seconds", 1.0) if seconds < 300 else ("minutes", 60.0) if seconds < 3 * 3600 else ("hours", 3600.0)


def _by(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    if label == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
