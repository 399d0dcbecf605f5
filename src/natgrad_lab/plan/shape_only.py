"""What a plan is asked about: a recipe by its name, or any model by the function that builds it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from natgrad_lab.data import Source
from natgrad_lab.models import Architecture
from natgrad_lab.recipes import find
from natgrad_lab.train.optimizers import SpNgd
from natgrad_lab.train.recipe import Recipe


@dataclass(frozen=True)
class ShapeOnlySource(Source):
    """Inputs of which only the shape is known."""

    size: tuple[int, ...] = (3, 224, 224)

    def shape(self) -> Any:
        return self.size

    def classes(self) -> int:
        return 0


@dataclass(frozen=True)
class Imported(Architecture):
    """A model of the user's: a function without arguments, as module:function."""

    target: str = ""

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        return imported(self.target)()


def imported(target: str) -> Callable[[], Any]:
    """The function that `target` names."""
    module, _, name = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model {target!r} is not there: {error}; name it as package.module:function") from error
    if not callable(found):
        raise ValueError(f"model {target!r} is {type(found).__name__}, not a function that returns a model")
    return found


def taken(arguments: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of a flag, and the arguments without it."""
    for place, word in enumerate(arguments):
        if word == flag:
            if place + 1 == len(arguments):
                raise ValueError(f"{flag} lacks a value; see natgrad plan --help")
            return arguments[place + 1], arguments[:place] + arguments[place + 2 :]
        if word.startswith(flag + "="):
            return word.split("=", 1)[1], arguments[:place] + arguments[place + 1 :]
    return None, arguments


def asked(arguments: list[str]) -> tuple[str, Recipe, int, list[str]]:
    """The name of what is planned, its recipe, how many tokens inputs are of (0: none), and the other arguments."""
    if not arguments[0].startswith("-"):
        name, *rest = arguments
        return name, find(name)(), 0, rest
    target, rest = taken(arguments, "--model")
    shape, rest = taken(rest, "--input")
    tokens, rest = taken(rest, "--tokens")
    if target is None:
        raise ValueError("natgrad plan RECIPE, or natgrad plan --model package.module:function --input 3,224,224")
    imported(target)
    size = numbers("--input", shape or "3,224,224")
    recipe = Recipe(ShapeOnlySource(size), Imported(target), SpNgd(), batch=1024)
    return target, recipe, 0 if tokens is None else numbers("--tokens", tokens)[0], rest


def numbers(name: str, words: str) -> tuple[int, ...]:
    """Whole numbers above 0, separated by commas."""
    try:
        found = tuple(int(word) for word in words.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise ValueError(f"{name} {words!r}: give whole numbers above 0, separated by commas")
    return found
