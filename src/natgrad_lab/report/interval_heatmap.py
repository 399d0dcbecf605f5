"""The heat map of refresh intervals: a row a statistic, dark where it is measured often."""

from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap
from matplotlib.ticker import MaxNLocator

from natgrad_lab.report.drawing import Picture, Plot, name

SHADES = LinearSegmentedColormap.from_list("ages", ["#08306B", "#2171B5", "#6BAED6", "#C6DBEF", "#EFF4FA"])
WIDE = 240
"""Columns at most; of more steps each column shows its first."""
NAMED = 64
"""Rows that are named; of more statistics every second, third, ... is."""


def heat(ages: list[dict[str, float]], steps: list[int] | None = None) -> Picture:
    """Draw intervals [step][statistic]; `steps` are the steps' numbers, 1, 2, ... if None."""
    names = list(dict.fromkeys(name for step in ages for name in step))
    stride = max(1, -(-len(ages) // WIDE))
    shown = ages[::stride]
    places = (steps or list(range(1, len(ages) + 1)))[::stride]
    grid = np.array([[step.get(name, 0) for step in shown] for name in names]).clip(0, 10**9).astype(int)
    edges = np.append(places, places[-1] + stride) - 0.5
    row = 0.19 if len(names) <= NAMED else 0.19 * NAMED / len(names)

    def draw(axes: Axes) -> None:
        _mesh(axes, grid, edges)
        every = -(-len(names) // NAMED)
        axes.set_yticks(range(0, len(names), every), [name(one) for one in names[::every]], fontsize=7.5)

    return Picture([Plot("", draw)], width="full", height=1.1 + row * len(names))


def _mesh(axes: Axes, grid: np.ndarray, edges: np.ndarray) -> None:
    top = int(grid.max())
    bounds = sorted({bound for bound in (1, 2, 3, 5, 9, 17, 33, 65) if bound <= top} | {1, max(top, 1) + 1})
    shades = ListedColormap([SHADES(place / max(1, len(bounds) - 2)) for place in range(max(1, len(bounds) - 1))])
    few = grid.size <= 4000
    mesh = axes.pcolormesh(
        edges,
        np.arange(len(grid) + 1) - 0.5,
        grid,
        cmap=shades,
        norm=BoundaryNorm(bounds, shades.N),
        edgecolors="#FFFFFF" if few else "none",
        linewidth=0.6 if few else 0.0,
        rasterized=not few,
    )
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    figure = axes.get_figure(root=True)
    assert figure is not None
    ticks = [(low + high) / 2 for low, high in pairwise(bounds)]
    bar = figure.colorbar(mesh, ax=axes, aspect=30, pad=0.01, ticks=ticks, label="steps between two measurements")
    bar.ax.set_yticklabels([str(low) if high == low + 1 else f"{low}-{high - 1}" for low, high in pairwise(bounds)])
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(length=0)
