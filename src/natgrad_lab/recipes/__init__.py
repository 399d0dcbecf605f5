"""One run a function: a module of this folder holds functions that return a Recipe, or a table of them, RECIPES.

A recipe's name is its function's; its docstring states the command, the cost and the result. A module whose name begins
with _ holds what several of them share.
"""

import difflib
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any, get_type_hints

from natgrad_lab.import_path import is_path, resolve
from natgrad_lab.train.recipe import Recipe

Maker = Callable[[], Recipe]
MODULES = (
    "cifar10",
    "cifar100",
    "cifar100_nlcg",
    "cifar10_seng",
    "digits",
    "imagefolder64",
    "imagenet_kfac",
    "imagenet_nlcg",
    "imagenet_seng",
    "imagenet_sgd",
    "imagenet_spngd",
    "imagenet_spngd_d",
)
"""Where recipes are."""


def every() -> dict[str, Maker]:
    """Return all recipes by name, in the order of their names."""
    found: dict[str, Maker] = {}
    for module in MODULES:
        found |= in_module(f"{__name__}.{module}")
    return dict(sorted(found.items()))


def in_module(name: str) -> dict[str, Maker]:
    """Return a module's public functions that promise a Recipe, and those of its table."""
    module = import_module(name)
    functions = inspect.getmembers(module, inspect.isfunction)
    return getattr(module, "RECIPES", {}) | {
        name: function
        for name, function in functions
        if function.__module__ == module.__name__
        and not name.startswith("_")
        and get_type_hints(function).get("return") is Recipe
    }


def find(name: str) -> Maker:
    """Return a recipe's function: ours, or anybody's by import path; raise ValueError with near misses."""
    if is_path(name):
        return anybodys(name)
    known = every()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see natgrad train --list"
        raise ValueError(f"there is no recipe {name!r}; {hint}")
    return known[name]


def anybodys(name: str) -> Maker:
    """Return what package.module:recipe or ./file.py:recipe names, a Recipe or a function that returns one."""
    found = resolve(name)

    def maker() -> Recipe:
        made = found() if inspect.isfunction(found) and not needed(found) else found
        if not isinstance(made, Recipe):
            raise ValueError(f"{name} is no recipe; name a Recipe, or a function without arguments that returns one")
        return made

    maker.__doc__ = getattr(found, "__doc__", None) if inspect.isfunction(found) else None
    return maker


def needed(function: Callable[..., Any]) -> list[str]:
    """Return the arguments without which a function cannot be called."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    known = inspect.signature(function).parameters.values()
    return [one.name for one in known if one.default is one.empty and one.kind not in several]


def title(name: str) -> str:
    """Return what a run of a recipe is called: the name, without the place that it was found in."""
    return name.rpartition(":")[2]
