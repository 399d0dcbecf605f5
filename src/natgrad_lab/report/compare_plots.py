"""The pictures of a comparison over all sizes of batch. Lines are medians over seeds.

An optimizer has one colour and mark everywhere: blues and greys are first-order, greens Muon, Shampoo, SOAP and DASH,
warm ones natgrad.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from natgrad_lab.report.compare_read import Comparison
from natgrad_lab.report.critical import Point, by_batch, critical_batch, mark
from natgrad_lab.report.drawing import Key, Picture, Plot, logarithmic
from natgrad_lab.report.style import INK

COLOURS = {
    "first-order": ("#08519C", "#3182BD", "#6BAED6", "#7A7A7A", "#B0B0B0"),
    "matrix": ("#006D2C", "#41AB5D", "#A1D99B", "#66A5A0"),
    "natgrad": ("#D55E00", "#E69F00", "#B2182B", "#CC79A7", "#8C6D00", "#762A83"),
}
MARKS = "osD^vP"
DOTTED = (0, (1, 2))


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


def keys(results: Comparison, marked: bool = True) -> list[Key]:
    """Return the legend of all optimizers."""
    return [Key(name, style["color"], style["marker"] if marked else "") for name, style in looks(results).items()]


def scaling(results: Comparison) -> Picture | None:
    """Steps to each target by batch: where a line stops falling, larger batches stop helping."""
    if len(results.batches) < 2:
        return None
    targets: list[tuple[str, Callable[[str], float | None]]] = [
        ("Steps to the goal", results.goal),
        *((f"Steps to {results.metric} {results.text(target)}", _always(target)) for target in results.targets),
    ]
    targets = targets[:1] + [one for one in targets[1:] if _anybody(results, one[1])]
    plots = [Plot(title, _steps_to(results, target)) for title, target in targets]
    explained = [
        Key("linear scaling", "#999999", dash=(0, (2, 3)), width=1.4),
        Key("critical batch", INK, "|", line=False),
        Key("not reached", INK, "x", line=False),
    ]
    return Picture(plots, keys(results) + explained, "third" if len(plots) % 3 == 0 else "half")


def _always(target: float) -> Callable[[str], float | None]:
    return lambda batch: target


def _anybody(results: Comparison, target: Callable[[str], float | None]) -> bool:
    """Whether a target is reached by some optimizer at some size of batch."""
    pairs = [(batch, name) for batch in results.batches for name in results.names if results.at(batch, name)]
    return any(math.isfinite(results.fewest(batch, name, target(batch))[0]) for batch, name in pairs)


def anybody(results: Comparison, target: float) -> bool:
    """Whether a fixed target is reached by some optimizer at some size of batch."""
    return _anybody(results, _always(target))


def reached(results: Comparison, name: str, target: Callable[[str], float | None]) -> list[Point]:
    """Return the sizes of batch at which an optimizer reaches a target, with its steps."""
    pairs = [(results.samples(batch), results.fewest(batch, name, target(batch))[0]) for batch in results.batches]
    return [(float(samples), steps) for samples, steps in pairs if math.isfinite(steps)]


def critical(results: Comparison) -> dict[str, list[tuple[float, bool] | None]]:
    """Return each optimizer's critical batch for each fixed target that somebody reaches, where any is known."""
    some = [target for target in results.targets if anybody(results, target)]
    if len(results.batches) < 2 or not some:
        return {}
    found = {
        name: [critical_batch(reached(results, name, _always(target))) for target in some] for name in results.names
    }
    return {name: sizes for name, sizes in found.items() if any(sizes)}


def _steps_to(results: Comparison, target: Callable[[str], float | None]) -> Callable[[Axes], None]:
    sizes = [results.samples(batch) for batch in results.batches]
    most = max(results.full(batch) for batch in results.batches)
    found = {name: reached(results, name, target) for name in results.names}
    styles = looks(results)

    def draw(axes: Axes) -> None:
        for name, points in found.items():
            if points:
                axes.plot(*zip(*points), **styles[name])
        _missed(axes, results, found, most)
        steps = [steps for points in found.values() for _, steps in points]
        first = [points[0] for points in found.values() if points]
        if steps:
            least = min(batch * count for batch, count in first)
            axes.plot(sizes, [least / size for size in sizes], color="#999999", linewidth=1, linestyle=(0, (2, 3)))
            for name, points in found.items():
                mark(axes, points, styles[name]["color"])
            axes.set_ylim(bottom=max(0.8, 0.7 * min(steps)))
        logarithmic(axes.yaxis)
        by_batch(axes, sizes, _names(results))

    return draw


def _names(results: Comparison) -> list[str]:
    """Return what stands at each size of batch on an axis."""
    return [f"{results.samples(batch)} (full)" if batch == "full" else batch for batch in results.batches]


def _missed(axes: Axes, results: Comparison, found: dict[str, list[Point]], most: int) -> None:
    """Draw a cross above all steps for each optimizer that does not get there."""
    styles, any_missed = looks(results), False
    for batch in results.batches:
        size = results.samples(batch)
        names = [name for name in found if results.at(batch, name) and size not in dict(found[name])]
        any_missed = any_missed or bool(names)
        for place, name in enumerate(names):
            style = {"color": styles[name]["color"], "markersize": 5, "linestyle": "none"}
            axes.plot(size, 1.6 * most * 1.13**place, marker="x", **style)
    if any_missed:
        axes.axhline(1.3 * most, color="#CCCCCC", linewidth=0.8)


def ends(results: Comparison) -> Picture | None:
    """Where everyone ends, by batch: after all steps, and after half of them."""
    if len(results.batches) < 2:
        return None
    places = ((0, "after all steps"), (-1, "after half of the steps, tuned for them"))
    shown = {place: _ends(results, place) for place, _ in places}
    values = [end for lines in shown.values() for points in lines.values() for _, end in points]
    plots = [
        Plot(f"Test {results.metric} {title}", _ending(results, shown[place], values))
        for place, title in (places if results.halved else places[:1])
    ]
    return Picture(plots, keys(results), "half")


def _ends(results: Comparison, place: int) -> dict[str, list[Point]]:
    """Return each optimizer's median ends by batch: of its longest budget of steps (0), or its shortest (-1)."""
    found: dict[str, list[Point]] = {}
    for name in results.names:
        lines = [some[place] for batch in results.batches if (some := results.at(batch, name))]
        ended = [(float(line.samples), line.end(results.column)) for line in lines]
        found[name] = [(samples, end) for samples, end in ended if end is not None]
    return found


def _ending(results: Comparison, lines: dict[str, list[Point]], values: list[float]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        styles = looks(results)
        for name, points in lines.items():
            if points:
                axes.plot(*zip(*points), **styles[name])
        zoom(axes, results, values)
        by_batch(axes, [results.samples(batch) for batch in results.batches], _names(results))

    return draw


def zoom(axes: Axes, results: Comparison, values: list[float]) -> None:
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
