"""`natgrad coverage`: which curvature each layer of a recipe's network has, why, and what it costs."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from natgrad.parallel import World
from natgrad_lab.train.loop import build_model
from natgrad_lab.train.recipe import Recipe


def show_coverage(name: str, recipe: Recipe) -> None:
    """Print a row for each layer, and the sums."""
    optimizer: Any = recipe.optimizer.build(build_model(recipe), World())
    if not hasattr(optimizer, "coverage"):
        kind = type(recipe.optimizer).__name__
        raise ValueError(f"{name} trains with {kind}, which knows no curvature; name a second-order recipe")
    rows = optimizer.coverage()
    console = Console()
    if not console.is_terminal:
        console.width = 160
    table = Table(title=f"{name}: curvature by layer", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    for heading, side in COLUMNS:
        table.add_column(heading, justify=side)
    for row in rows:
        table.add_row(row.layer, row.kind, row.curvature, row.shape, *costs(row), row.why)
    table.add_section()
    table.add_row("all", "", "", "", *costs(Sums(rows)), "")
    console.print(table)


COLUMNS: tuple[tuple[str, Any], ...] = (
    ("layer", "left"),
    ("kind", "left"),
    ("curvature", "left"),
    ("shape", "left"),
    ("parameters", "right"),
    ("state, KB", "right"),
    ("refresh, MFLOP", "right"),
    ("why", "left"),
)


class Sums:
    """The sums of the rows' costs."""

    def __init__(self, rows: list[Any]) -> None:
        self.parameters = sum(row.parameters for row in rows)
        self.bytes = sum(row.bytes for row in rows)
        self.flops = sum(row.flops for row in rows)


def costs(row: Any) -> tuple[str, str, str]:
    """Return parameters, state and work of a refresh in the table's units."""
    return f"{row.parameters:,}", f"{row.bytes / 1e3:,.1f}", f"{row.flops / 1e6:,.1f}"
