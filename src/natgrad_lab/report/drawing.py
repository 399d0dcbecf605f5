"""A picture is some plots that a page puts beside or below one another, with one legend that says what each mark is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from natgrad_lab.report.markup import NOTHING, Markup, tag, text
from natgrad_lab.report.style import picture, variable

Width = Literal["third", "half", "full"]
INCHES = {"third": (3.4, 2.3), "half": (4.8, 3.1), "full": (9.8, 3.4)}
"""A plot's width and height by the part of a page that it takes; letters keep a readable size in each."""
NAME = 32
"""Letters of a name in a plot."""


@dataclass(frozen=True)
class Key:
    """One entry of a legend: what a colour, a mark or a kind of line stands for."""

    label: str
    colour: str
    mark: str = ""
    """A mark as matplotlib names it; "area" for a filled part, "hollow" and "ring" for circles, else only the line."""
    line: bool = True
    dash: Any = "-"
    width: float = 2.0


@dataclass(frozen=True)
class Plot:
    """One set of axes: its title, who draws it, and what a reader has to know of it."""

    title: str
    draw: Callable[[Axes], None]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """Plots with one legend."""

    plots: list[Plot]
    keys: list[Key] = field(default_factory=list)
    width: Width = "third"
    height: float | None = None
    """Inches, where the usual height does not do."""


def drawn(plot: Plot, shape: tuple[float, float]) -> Figure | None:
    """Draw one plot; None where it has nothing to show."""
    figure = Figure(figsize=shape, layout="constrained")
    axes = figure.subplots()
    plot.draw(axes)
    return figure if _shows_something(axes) else None


def _shows_something(axes: Axes) -> bool:
    """Say whether any of the data is finite: axes without data would have a range that nobody measured."""
    return bool(np.isfinite(axes.dataLim.get_points()).all())


def framed(shown: Picture | None, heading: str, caption: str = "") -> Markup:
    """Return a picture with its heading, legend and caption; nothing where no plot has anything to show."""
    if shown is None:
        return NOTHING
    shape = INCHES[shown.width]
    shape = (shape[0], shown.height or shape[1])
    panels = [_panel(plot, shape, heading if len(shown.plots) == 1 else "") for plot in shown.plots]
    if not any(panels):
        return NOTHING
    legend = tag("ul", [tag("li", _chip(key), key.label) for key in shown.keys], class_="legend")
    return tag(
        "figure",
        tag("h3", heading),
        legend if shown.keys else NOTHING,
        tag("div", panels, class_=f"panels {shown.width}"),
        tag("figcaption", caption) if caption else NOTHING,
    )


def _panel(plot: Plot, shape: tuple[float, float], heading: str) -> Markup:
    figure = drawn(plot, shape)
    if figure is None:
        return NOTHING
    return tag(
        "div",
        tag("h4", plot.title) if plot.title and plot.title != heading else NOTHING,
        tag("div", picture(figure, plot.title or heading), class_="drawing"),
        tag("p", plot.note) if plot.note else NOTHING,
        class_="panel",
    )


def pair(left: Markup, right: Markup) -> Markup:
    """Put two pictures beside one another where there is room."""
    return tag("div", left, right, class_="pair") if left and right else left or right


def sheet(shown: Picture) -> Figure:
    """Draw all plots and their legend on one figure, for a file of its own."""
    count = len(shown.plots)
    across = 3 if shown.width == "third" and count % 3 == 0 else min(2, count)
    down = -(-count // across)
    figure = Figure(figsize=(10.4, (3.6 if count > 1 else 4.2) * down + 0.4), layout="constrained")
    grid = np.asarray(figure.subplots(down, across, squeeze=False)).flatten()
    for axes in grid[count:]:
        axes.axis("off")
    for axes, plot in zip(grid, shown.plots):
        plot.draw(axes)
        axes.set_title(plot.title, fontsize=9.5)
    handles = [_handle(key) for key in shown.keys]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8.5)
    return figure


def logarithmic(axis: Axis) -> None:
    """Put an axis of data that is drawn on a logarithmic scale, with plain numbers at its ticks."""
    scale = axis.axes.set_xscale if isinstance(axis, XAxis) else axis.axes.set_yscale
    scale("log")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1e3 * low else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def name(label: object) -> str:
    """Return a name as a plot has room for it."""
    return text(label, NAME).replace("\n", " ")


MARKS = {
    "o": '<circle cx="14" cy="6" r="3.2"/>',
    "s": '<rect x="11" y="3" width="6" height="6"/>',
    "D": '<path d="M14 2 18 6 14 10 10 6Z"/>',
    "^": '<path d="M14 2.4 17.8 9.4H10.2Z"/>',
    "v": '<path d="M14 9.6 17.8 2.6H10.2Z"/>',
    "P": '<path d="M12.7 2.5h2.6v2.2h2.2v2.6h-2.2v2.2h-2.6v-2.2h-2.2v-2.6h2.2Z"/>',
    "x": '<path class="open" d="M11 3 17 9M17 3 11 9"/>',
    "|": '<path class="open" d="M14 0V12"/>',
    "hollow": '<circle class="open" cx="14" cy="6" r="3"/>',
    "ring": '<circle class="open" cx="14" cy="6" r="5"/>',
    "area": '<rect x="4" y="1" width="20" height="10" rx="1.5"/>',
}


def _chip(key: Key) -> Markup:
    """Return a legend's mark as the plots draw it."""
    dash = "" if isinstance(key.dash, str) else ",".join(f"{2 * length:g}" for length in key.dash[1])
    line = tag("path", class_="open", d="M1 6H27", stroke_dasharray=dash or "none", stroke_width=f"{key.width:g}")
    shape = Markup(MARKS.get(key.mark, ""))
    style = f"stroke:{variable(key.colour)};fill:{variable(key.colour)}"
    return tag("svg", line if key.line else NOTHING, shape, class_="chip", viewBox="0 0 28 12", style=style)


def _handle(key: Key) -> Line2D | Patch:
    if key.mark == "area":
        return Patch(color=key.colour, label=key.label)
    mark, fill = ("o", "none") if key.mark in ("hollow", "ring") else (key.mark or "none", key.colour)
    style: dict[str, Any] = {"markersize": 9 if key.mark == "ring" else 5, "markerfacecolor": fill}
    dash = key.dash if key.line else "none"
    return Line2D([], [], color=key.colour, marker=mark, linestyle=dash, linewidth=key.width, label=key.label, **style)
