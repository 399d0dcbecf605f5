"""The critical batch: from where on more samples a step save too few steps; drawn as steps to a target by batch.

With linear scaling twice the batch needs half of the steps. The critical batch is where steps are 20 % above that
(Zhang et al. 2024, arXiv 2410.21676, section 2), counted from the batch that needs the fewest samples, on a straight
line between measured batches in log-log.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from natgrad_lab.report.drawing import Key, Picture, Plot, framed, logarithmic, name
from natgrad_lab.report.files import number, read_json
from natgrad_lab.report.markup import Markup, join, tag, text
from natgrad_lab.report.page import document, note, numbers
from natgrad_lab.report.style import INK, look

ABOVE = 1.2
"""Steps over those of linear scaling at the critical batch."""
FILES = "critical*.json"
"""What benchmarks/critical.py writes."""
MOST = 64
"""Files, and optimizers of one, at most."""
APART = 0.16
"""Share of a logarithmic axis between two sizes of batch that are both named."""
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#56B4E9", "#CC79A7", "#E69F00", "#7A7A7A", "#8C6D00")
MARKS = "osD^vP"
CAPTION = (
    "Dotted: linear scaling, where twice the batch takes half of the steps. Bar: the critical batch, where steps are "
    "20 % above linear scaling. Further right, more samples a step save few steps."
)

Point = tuple[float, float]
"""Samples of a batch, and steps to the target."""


@dataclass(frozen=True)
class Measured:
    """Steps to a target by batch for some optimizers, as a file has them."""

    name: str
    target: str
    points: dict[str, list[Point]]
    rates: dict[str, dict[float, float]]
    """The learning rate by optimizer and batch."""


def critical_batch(points: Sequence[Point]) -> tuple[float, bool] | None:
    """Return the critical batch in samples, and whether a batch above it was measured (else the last one measured).

    `points` go from small to large batches, with finite steps; None for fewer than two.
    """
    if len(points) < 2:
        return None
    least = min(batch * steps for batch, steps in points)
    start = next(place for place, (batch, steps) in enumerate(points) if batch * steps == least)
    above = [(batch, batch * steps / least) for batch, steps in points[start:]]
    for (small, low), (large, high) in pairwise(above):
        if high >= ABOVE:
            share = (math.log(ABOVE) - math.log(low)) / (math.log(high) - math.log(low))
            return math.exp(math.log(small) + share * (math.log(large) - math.log(small))), True
    return float(points[-1][0]), False


def words(found: tuple[float, bool] | None) -> str:
    """Return a critical batch with two figures; "above" where no measured batch was."""
    if found is None:
        return "-"
    size, seen = found
    return f"{'' if seen else 'above '}{round(size, 1 - math.floor(math.log10(size))):,.0f}"


def mark(axes: Axes, points: Sequence[Point], colour: str) -> None:
    """Draw a bar on an optimizer's line at its critical batch, where one was seen."""
    found = critical_batch(points)
    if found is not None and found[1]:
        least = min(batch * steps for batch, steps in points)
        style: dict[str, Any] = {"color": colour, "markersize": 15, "markeredgewidth": 2, "linestyle": "none"}
        axes.plot([found[0]], [ABOVE * least / found[0]], "|", **style)


def by_batch(axes: Axes, sizes: Sequence[float], batches: Sequence[str] | None = None) -> None:
    """Put sizes of batch, small to large, along the axis; those that have room are named."""
    axes.set_xscale("log")
    shown: list[float] = []
    for size in reversed(sizes):  # the largest always
        if not shown or math.log(shown[-1] / size) > APART * math.log(sizes[-1] / sizes[0]):
            shown.append(size)
    labels = dict(zip(sizes, batches or [f"{size:,.0f}" for size in sizes]))
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([name(labels[size]) for size in shown])
    axes.set_xlabel("samples in a batch")


def picture(measured: Measured) -> Picture:
    """Steps to the target by batch, each optimizer with its own line of linear scaling."""
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(measured.points)}
    marks = {name: MARKS[place % len(MARKS)] for place, name in enumerate(measured.points)}
    keys = [Key(name, colours[name], marks[name]) for name in measured.points]
    keys += [Key("linear scaling", INK, dash=(0, (1, 2)), width=1.2), Key("critical batch", INK, "|", line=False)]
    return Picture([Plot(f"Steps to {measured.target}", _drawing(measured, colours, marks))], keys, "half", 3.5)


def _drawing(measured: Measured, colours: dict[str, str], marks: dict[str, str]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for who, points in measured.points.items():
            if not points:
                continue
            batches, steps = zip(*points)
            axes.plot(batches, steps, color=colours[who], marker=marks[who], markersize=5)
            least = min(batch * count for batch, count in points)
            ideal = [least / batch for batch in batches]
            axes.plot(batches, ideal, color=colours[who], linestyle=(0, (1, 2)), linewidth=0.9)
            mark(axes, points, colours[who])
        logarithmic(axes.yaxis)
        by_batch(axes, sorted({batch for points in measured.points.values() for batch, _ in points}))

    return draw


def section(measured: Measured) -> Markup:
    """Return the picture and the table of one file."""
    sizes = sorted({batch for points in measured.points.values() for batch, _ in points})
    heads = ["optimizer", "critical batch", *(f"{size:,.0f}" for size in sizes)]
    rows = []
    for who, points in measured.points.items():
        steps, rates = dict(points), measured.rates[who]
        cells = [f"{steps[size]:.4g}{_rate(rates.get(size))}" if size in steps else "-" for size in sizes]
        rows.append([who, words(critical_batch(points)), *cells])
    told = "Steps to the target by batch, in brackets the learning rate; of several seeds the mean."
    return join(
        framed(picture(measured), f"Critical batch: {measured.name}", CAPTION), numbers(heads, rows), note(told)
    )


def _rate(rate: float | None) -> str:
    return "" if rate is None else f" ({rate:.3g})"


def page(found: list[Measured]) -> str:
    """Return the page of a folder's measurements as text."""
    head = tag("header", tag("h1", "Critical batch"), tag("p", "Steps to a target by the size of a batch."))
    with look():
        return document("critical batch", [head, *(section(measured) for measured in found)])


def read_critical(folder: Path) -> list[Measured]:
    """Read the files of a folder; none where there are none."""
    return [_read(path) for path in sorted(folder.glob(FILES))[:MOST]]


def _read(path: Path) -> Measured:
    try:
        return _measured(path.stem, read_json(path))
    except (KeyError, TypeError, AttributeError, FileNotFoundError):
        raise ValueError(f"{str(path)!r} does not hold what benchmarks/critical.py writes; move it away") from None


def _measured(name: str, values: Any) -> Measured:
    target = number(values["target"])
    points: dict[str, list[Point]] = {}
    rates: dict[str, dict[float, float]] = {}
    for row in values["rows"]:
        batch, steps, who = number(row["batch"]), _steps(row), text(row["optimizer"], 60)
        if batch is None or batch < 1 or len(points) > MOST:
            raise TypeError
        own = points.setdefault(who, [])
        if steps is not None:
            own.append((batch, steps))
        if (rate := number(row["lr"])) is not None:
            rates.setdefault(who, {})[batch] = rate
        rates.setdefault(who, {})
    told = "the target" if target is None else f"{target:.0%} test accuracy"
    return Measured(text(name, 60), told, {who: sorted(own) for who, own in points.items()}, rates)


def _steps(row: dict[str, Any]) -> float | None:
    """Return the mean over fresh seeds, or tuning's where none were run; None where the target was not reached."""
    seen = [number(one) for one in row["fresh"]] or [number(row["tuning"])]
    known = [one for one in seen if one is not None and one > 0]
    return fmean(known) if len(known) == len(seen) else None
