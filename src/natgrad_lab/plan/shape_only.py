"""What a plan is asked about: a recipe by its name, or any model by the function that builds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from natgrad_lab.data import Source
from natgrad_lab.import_path import is_path
from natgrad_lab.models import UserModel
from natgrad_lab.recipes import find
from natgrad_lab.train.optimizers import SpNgd
from natgrad_lab.train.recipe import Recipe

CLASSES = 1000  # of a network that asks, where nobody has said how many (ImageNet's)


@dataclass(frozen=True)
class ShapeOnlySource(Source):
    """Inputs of which only the shape is known."""

    size: tuple[int, ...] = (3, 224, 224)

    def shape(self) -> Any:
        return self.size

    def classes(self) -> int:
        return 0


@dataclass(frozen=True)
class AnyOutput(UserModel):
    """A network of the user's, whatever its output is."""

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        model = self.maker(shape)(**self.values(), **self.told(shape, classes or CLASSES))
        if not isinstance(model, nn.Module):
            raise ValueError(f"{self.source} gave a {type(model).__name__}, not a torch.nn.Module")
        return model


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
    if not is_path(target):
        raise ValueError(f"--model {target!r} names nothing; write package.module:function or ./file.py:function")
    model = AnyOutput(target)
    model.load()
    size = numbers("--input", shape or "3,224,224")
    recipe = Recipe(ShapeOnlySource(size), model, SpNgd(), batch=1024)
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
