"""Recipes that differ in a few numbers: rows of a table, each of which becomes a function with a docstring.

A module says `RECIPES = family(__name__, {name: row, ...})`, with every name written out.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from natgrad_lab.train.recipe import Recipe

Maker = Callable[[], Recipe]


class RecipeRow(NamedTuple):
    """One recipe: how it is made, and what its docstring says."""

    make: Maker
    title: str
    cost: str
    result: str
    path: str
    """What --data.path names, in the command."""


def family(module: str, rows: Mapping[str, RecipeRow]) -> dict[str, Maker]:
    """Return a function of each row, by name."""
    return {name: _function(module, name, row) for name, row in rows.items()}


def _function(module: str, name: str, row: RecipeRow) -> Maker:
    def recipe() -> Recipe:
        return row.make()

    recipe.__name__ = recipe.__qualname__ = name
    recipe.__module__ = module
    recipe.__doc__ = (
        f"{row.title}.\n\n    Command: natgrad train {name} --data.path {row.path}\n"
        f"    Cost: {row.cost}.\n    Result: {row.result}.\n    "
    )
    return recipe
