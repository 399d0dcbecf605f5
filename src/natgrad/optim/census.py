"""The parameters that a model had when its optimizer was built, to notice at every step what has changed since."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import nn

REBUILD = "call optimizer.rebuild()"


class Known(NamedTuple):
    """A parameter where it was found."""

    name: str
    key: str
    parameter: nn.Parameter
    dtype: torch.dtype
    device: torch.device
    trained: bool


class Census:
    """Modules and parameters of a model. `scope`: the parameters that `params=` named, None for all."""

    def __init__(self, model: nn.Module, trained: Sequence[nn.Parameter], scope: Collection[nn.Parameter] | None):
        self.model, self.scope = model, scope
        ours = set(trained)
        self.modules = [(name, module, tuple(module._modules.values())) for name, module in model.named_modules()]
        self.entries = [
            (module, len(module._parameters), self._known(name, module, ours)) for name, module, _ in self.modules
        ]

    @staticmethod
    def _known(name: str, module: nn.Module, ours: set[nn.Parameter]) -> list[Known]:
        pairs = [(key, p) for key, p in module._parameters.items() if p is not None]
        return [Known(f"{name}.{key}".lstrip("."), key, p, p.dtype, p.device, p in ours) for key, p in pairs]

    def unfrozen(self) -> bool:
        """Whether parameters that were frozen when the census was taken are to train now."""
        return any(
            not known.trained
            and known.parameter.requires_grad
            and (self.scope is None or known.parameter in self.scope)
            for _, _, entries in self.entries
            for known in entries
        )

    def changes(self) -> list[str]:
        """What trains unlike its user may think, one line each.

        Raises:
            ValueError: for a parameter of this optimizer that is no longer the model's, or that has moved.

        """
        told: list[str] = []
        for _, module, children in self.modules:
            if len(module._modules) != len(children) or any(
                a is not b for a, b in zip(module._modules.values(), children)
            ):
                told += self._strangers()
                break
        for module, count, entries in self.entries:
            own = module._parameters
            if len(own) != count:
                told += self._strangers()
            for known in entries:
                now = own.get(known.key)
                if now is None or now is not known.parameter:
                    self._replaced(known)
                elif now.dtype is not known.dtype or now.device != known.device:
                    self._moved(known, now)
        return list(dict.fromkeys(told))

    def _strangers(self) -> list[str]:
        """Parameters of the model that are new; refuses where one of ours is no longer there."""
        here = dict(self.model.named_parameters())
        known = {id(entry.parameter) for _, _, entries in self.entries for entry in entries}
        present = {id(p) for p in here.values()}
        for _, _, entries in self.entries:
            for entry in entries:
                if entry.trained and id(entry.parameter) not in present:
                    self._replaced(entry)
        return [
            f"{name} was added to the model after the optimizer was built and does not train: {REBUILD}"
            for name, p in here.items()
            if id(p) not in known and p.requires_grad and self.scope is None
        ]

    def _replaced(self, known: Known) -> None:
        if known.trained:
            raise ValueError(
                f"{known.name} is no longer the parameter that this optimizer was built with (replaced, removed or "
                f"parametrised since): {REBUILD}, or build the optimizer after changing the model"
            )

    def _moved(self, known: Known, now: nn.Parameter) -> None:
        if known.trained:
            raise ValueError(
                f"{known.name} was {known.dtype} on {known.device} when the optimizer was built and is {now.dtype} on "
                f"{now.device} now: {REBUILD}, or build the optimizer after moving the model"
            )
