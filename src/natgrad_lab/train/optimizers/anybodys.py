"""Any optimizer class by its import path: torch.optim's interface, or natgrad's, which takes the model."""

import inspect
import json
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from natgrad.optim import SecondOrder
from natgrad.parallel import World
from natgrad_lab.import_path import resolve
from natgrad_lab.train.optimizers.settings import Settings, alone, positive


@dataclass(frozen=True)
class Anybodys(Settings):
    """An optimizer of one's own."""

    path: str = ""
    """package.module:Class or ./file.py:Class."""
    arguments: str = "{}"
    """What else the class takes, as JSON: '{"momentum": 0.9}'."""

    @property
    def cuttable(self) -> bool:
        return issubclass(optimizer_class(self.path), SecondOrder)

    def build(self, model: nn.Module, world: World) -> Optimizer:
        positive("lr", self.lr)
        made, others = optimizer_class(self.path), self._others()
        try:
            if issubclass(made, SecondOrder):
                return made(model, lr=self.lr, world=world, **others)  # type: ignore[call-arg]
            return alone(made(model.parameters(), lr=self.lr, **others), model, world)  # type: ignore[call-arg]
        except TypeError as error:
            raise ValueError(
                f"{self.path} cannot be built by {made.__name__}(parameters, lr={self.lr:g}, **{others}): {error}"
            ) from error

    def _others(self) -> dict[str, Any]:
        try:
            found = json.loads(self.arguments)
        except ValueError as error:
            raise ValueError(f"arguments={self.arguments!r} is no JSON ({error}); set --optimizer.arguments") from None
        if not isinstance(found, dict):
            raise ValueError(f"arguments={self.arguments!r} is no JSON object such as {{}}; set --optimizer.arguments")
        return found


def optimizer_class(path: str) -> type[Optimizer]:
    """Return the class at an import path; ValueError where there is none."""
    found = resolve(path)
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ValueError(f"{path} is no class of optimizers; name one that derives from torch.optim.Optimizer")
    return found


def anybodys(path: str) -> Anybodys:
    """Return the settings of the class at a path, with its own default for lr where it has one."""
    known = inspect.signature(optimizer_class(path).__init__).parameters
    default: Any = known["lr"].default if "lr" in known else None
    if isinstance(default, int | float) and not isinstance(default, bool) and default > 0:
        return Anybodys(lr=float(default), path=path)
    return Anybodys(path=path)
