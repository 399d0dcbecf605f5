"""One run a function: each module of this folder holds functions that return a Recipe, found here by
themselves; a module whose name begins with _ holds what several of them share.

A recipe's name is its function's; its docstring states the command, the cost and the result.
"""

import difflib
import inspect
import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import get_type_hints

from natgrad.train.recipe import Recipe

Maker = Callable[[], Recipe]


def every() -> dict[str, Maker]:
    """Return all recipes by name, in the order of their names."""
    found: dict[str, Maker] = {}
    names = (entry.name for entry in pkgutil.iter_modules(__path__))
    for module in sorted(name for name in names if not name.startswith("_")):
        found |= in_module(f"{__name__}.{module}")
    return dict(sorted(found.items()))


def in_module(name: str) -> dict[str, Maker]:
    """Return a module's public functions that promise a Recipe."""
    module = import_module(name)
    functions = inspect.getmembers(module, inspect.isfunction)
    return {
        name: function
        for name, function in functions
        if function.__module__ == module.__name__
        and not name.startswith("_")
        and get_type_hints(function).get("return") is Recipe
    }


def find(name: str) -> Maker:
    """Return a recipe's function; raise ValueError with near misses."""
    known = every()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see natgrad train --list"
        raise ValueError(f"there is no recipe {name!r}; {hint}")
    return known[name]
