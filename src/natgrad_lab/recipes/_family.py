"""Recipes that differ in a few numbers: rows of a table, each of which becomes a function with a docstring.

A module does `globals().update(family(__name__, rows))`; its recipes can then be imported by name as if they had been
written out.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from natgrad_lab.train.recipe import Recipe

Maker = Callable[[], Recipe]


class RecipeRow(NamedTuple):
    """One recipe: its name, how it is made, and what its docstring says."""

    name: str
    make: Maker
    title: str
    cost: str
    result: str
    path: str
    """What --data.path names, in the command."""


def family(module: str, rows: Iterable[RecipeRow]) -> dict[str, Maker]:
    """Return a function of each row, by name."""
    return {row.name: _function(module, row) for row in rows}


def _function(module: str, row: RecipeRow) -> Maker:
    def recipe() -> Recipe:
        return row.make()

    recipe.__name__ = recipe.__qualname__ = row.name
    recipe.__module__ = module
    recipe.__doc__ = (
        f"{row.title}.\n\n    Command: natgrad train {row.name} --data.path {row.path}\n"
        f"    Cost: {row.cost}.\n    Result: {row.result}.\n    "
    )
    return recipe
