"""The figures of a comparison, each a function of its lines alone. Lines are medians over seeds.

An optimizer has one colour and mark everywhere: blues and greys are first-order, greens Muon, Shampoo, SOAP and DASH,
warm ones natgrad.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator, PercentFormatter

from natgrad_lab.report.compare_read import Comparison

COLOURS = {
    "first-order": ("#08519C", "#3182BD", "#6BAED6", "#7A7A7A", "#B0B0B0"),
    "matrix": ("#006D2C", "#41AB5D", "#A1D99B", "#66A5A0"),
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
        ("the best first-order end", results.goal),
        *((f"{results.metric} {results.text(target)}", lambda batch, t=target: t) for target in results.targets),
    ]
    targets = targets[:1] + [one for one in targets[1:] if _anybody(results, one[1])]
    count = len(targets)
    across = 3 if count % 3 == 0 else 2
    down = math.ceil(count / across)
    figure = Figure(figsize=(10.4, 4.2 * down), layout="constrained")
    panels = np.asarray(figure.subplots(down, across, squeeze=False)).flatten()
    for axes, (title, target) in zip(panels, targets):
        _steps_to(axes, results, target)
        axes.set_title(f"Steps to {title}", fontsize=9.5)
    for axes in panels[count:]:
        axes.axis("off")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=7, fontsize=8.5)
    return figure


def _anybody(results: Comparison, target: Callable[[str], float | None]) -> bool:
    """Whether a target is reached by some optimizer at some size of batch."""
    pairs = [(batch, name) for batch in results.batches for name in results.names if results.at(batch, name)]
    return any(math.isfinite(results.fewest(batch, name, target(batch))[0]) for batch, name in pairs)


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
        place = ("axes fraction", "data")
        axes.annotate("never:", (0.01, 1.36 * most), xycoords=place, fontsize=8, color="#777777")
    finite = [values[0] for values in found.values() if math.isfinite(values[0])]
    if finite:
        least = min(finite)
        ideal = [least * sizes[0] / size for size in sizes]
        axes.plot(sizes, ideal, color="#999999", linewidth=1, linestyle=(0, (2, 3)))
        axes.set_ylim(bottom=max(0.8, 0.7 * min(v for values in found.values() for v in values if math.isfinite(v))))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
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
    zoom(panels[0], results, values)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8.5)
    return figure


def _number(value: float | None) -> float:
    return math.nan if value is None else value


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
