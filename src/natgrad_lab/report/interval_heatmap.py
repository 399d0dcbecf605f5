"""The heat map of refresh intervals: a row a statistic, dark where it is measured often."""

from itertools import pairwise

import numpy as np
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

SHADES = LinearSegmentedColormap.from_list("ages", ["#08306B", "#2171B5", "#6BAED6", "#C6DBEF", "#EFF4FA"])
WIDE = 240
"""Columns at most; of more steps each column shows its first."""
NAMED = 64
"""Rows that are named; of more statistics every second, third, ... is."""


def heat(ages: list[dict[str, int]], title: str, steps: list[int] | None = None) -> Figure:
    """Draw intervals [step][statistic]; `steps` are the steps' numbers, 1, 2, ... if None."""
    names = list(ages[0])
    stride = max(1, -(-len(ages) // WIDE))
    shown = ages[::stride]
    numbers = (steps or list(range(1, len(ages) + 1)))[::stride]
    grid = np.array([[step.get(name, 0) for step in shown] for name in names])
    edges = np.append(numbers, numbers[-1] + stride) - 0.5
    bounds = sorted({1, 2, 3, 5, 9, 17, 33, 65, grid.max() + 1} & set(range(1, grid.max() + 2)))
    row = 0.19 if len(names) <= NAMED else 0.19 * NAMED / len(names)
    figure = Figure(figsize=(10.4, 1.3 + row * len(names)), layout="constrained")
    axes = figure.subplots()
    shades = ListedColormap([SHADES(place / max(1, len(bounds) - 2)) for place in range(max(1, len(bounds) - 1))])
    few = grid.size <= 4000
    mesh = axes.pcolormesh(
        edges,
        np.arange(len(names) + 1) - 0.5,
        grid,
        cmap=shades,
        norm=BoundaryNorm(bounds, shades.N),
        edgecolors="white" if few else "none",
        linewidth=0.6 if few else 0.0,
        rasterized=not few,
    )
    every = -(-len(names) // NAMED)
    axes.set_yticks(range(0, len(names), every), names[::every], fontsize=7.5)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_title(title)
    bar = figure.colorbar(
        mesh, ax=axes, aspect=30, pad=0.01, ticks=[(low + high) / 2 for low, high in pairwise(bounds)]
    )
    bar.ax.set_yticklabels([str(low) if high == low + 1 else f"{low}-{high - 1}" for low, high in pairwise(bounds)])
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(length=0)
    return figure
