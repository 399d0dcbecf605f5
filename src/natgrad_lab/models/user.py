"""Anybody's network: a function or class named by where it is, or a model of torchvision or timm.

    natgrad train digits_spngd --model ./mine.py:make --model.args '{"width": 32}'
    natgrad train cifar100_resnet20_seng --model torchvision:resnet18

It is called with what it has names for: `classes` or `num_classes`, `shape` (channels, height, width), and the
keyword arguments given; its weights are what it makes them.
"""

import importlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from natgrad_lab.import_path import resolve
from natgrad_lab.models.architecture import Architecture

LIBRARIES = ("torchvision", "timm")
EXAMPLE = """write --model.args '{"width": 32}'"""


@dataclass(frozen=True)
class UserModel(Architecture):
    """A network that is not natgrad's."""

    source: str = ""
    """What makes it: package.module:function, ./file.py:function, torchvision:NAME or timm:NAME."""
    args: str = "{}"
    """Further keyword arguments, as JSON: {"width": 32}."""

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """Call what is named; ValueError where it makes no module, or one with another output than [n, classes]."""
        model = self.maker(shape)(**self.values(), **self.told(shape, classes))
        if not isinstance(model, nn.Module):
            raise ValueError(f"{self.source} gave a {type(model).__name__}, not a torch.nn.Module")
        check_output(model, shape, classes, self.source)
        return model

    def load(self) -> None:
        if self.source.partition(":")[0] not in LIBRARIES:
            resolve(self.source)

    def maker(self, shape: tuple[int, ...]) -> Callable[..., Any]:
        """Return what is to be called."""
        place, _, name = self.source.partition(":")
        if place in LIBRARIES:
            return _torchvision(name, shape) if place == "torchvision" else _timm(name, shape)
        found = resolve(self.source)
        if isinstance(found, nn.Module):
            raise ValueError(f"{self.source} is a module that is built already; name what builds it")
        if not callable(found):
            raise ValueError(f"{self.source} is a {type(found).__name__}; name a function or class that makes a module")
        return found

    def values(self) -> dict[str, Any]:
        """Return the keyword arguments given."""
        try:
            values = json.loads(self.args)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"args={self.args!r} is no JSON ({error}); write --model.args '{{\"width\": 32}}'"
            ) from None
        if not isinstance(values, dict):
            raise ValueError(f"args={self.args!r} must be names and values; {EXAMPLE}")
        return values

    def told(self, shape: tuple[int, ...], classes: int) -> dict[str, Any]:
        """Return what the signature asks for by name and was not given; ValueError where arguments do not fit."""
        values, maker = self.values(), self.maker(shape)
        known = inspect.signature(maker).parameters
        offered = {"classes": classes, "num_classes": classes, "shape": shape}
        told = {name: value for name, value in offered.items() if name in known and name not in values}
        try:
            inspect.signature(maker).bind(**values, **told)
        except TypeError as error:
            raise ValueError(f"{self.source}: {error}; set --model.args '{{\"name\": value}}'") from None
        return told


def check_output(model: nn.Module, shape: tuple[int, ...], classes: int, source: str) -> None:
    """Pass two inputs of zeros; ValueError where the output is not [2, classes] (and places, for sequences)."""
    inputs = torch.zeros(2, *shape) if len(shape) == 3 else torch.zeros(2, *shape, dtype=torch.int64)
    before = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            output = model.eval()(inputs)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{source} cannot take inputs [2, {', '.join(map(str, shape))}]: {text}") from None
    finally:
        for module, mode in before.items():
            module.training = mode
    if not isinstance(output, torch.Tensor):
        raise ValueError(f"{source} gave a {type(output).__name__}, not a tensor of logits [n, {classes}]")
    if tuple(output.shape if len(shape) == 3 else output.shape[:2]) != (2, classes):
        raise ValueError(
            f"{source} gave {list(output.shape)} for two inputs, not [2, {classes}]: the data has {classes} classes"
        )


def _torchvision(name: str, shape: tuple[int, ...]) -> Callable[..., Any]:
    models = _library("torchvision.models")
    if name not in models.list_models():
        raise ValueError(f"torchvision has no model {name!r}; torchvision.models.list_models() has the names")

    def make(num_classes: int, **values: Any) -> Any:
        return models.get_model(name, num_classes=num_classes, **values)

    return make


def _timm(name: str, shape: tuple[int, ...]) -> Callable[..., Any]:
    timm = _library("timm")
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}; timm.list_models() has the names")

    def make(num_classes: int, **values: Any) -> Any:
        return timm.create_model(name, **{"num_classes": num_classes, "in_chans": shape[0], **values})

    return make


def _library(name: str) -> Any:
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (package, name):
            raise
        raise ValueError(f"{package} is not installed; pip install {package}, or name another --model") from None
    except (RuntimeError, ImportError, OSError) as error:  # built for another torch
        raise ValueError(f"{package} cannot be imported ({error}); install the one made for this torch") from None
