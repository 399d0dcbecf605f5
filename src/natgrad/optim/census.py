"""The parameters that a model had when its optimizer was built, to notice at every step what has changed since."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import nn

REBUILD = "call optimizer.rebuild()"


class Known(NamedTuple):
    """A parameter, and where it was found."""

    owner: nn.Module
    key: str
    parameter: nn.Parameter
    dtype: torch.dtype
    device: torch.device
    trained: bool
    name: str


class Census:
    """Modules and parameters of a model. `scope`: the parameters that `params=` named, None for all."""

    def __init__(self, model: nn.Module, trained: Sequence[nn.Parameter], scope: Collection[nn.Parameter] | None):
        self.model, self.scope = model, scope
        ours = set(trained)
        found = list(model.named_modules())
        self.sizes = [(m, len(m._modules), len(m._parameters)) for _, m in found]
        self.children = [(m, key, child) for _, m in found for key, child in m._modules.items()]
        self.known = [
            Known(m, key, p, p.dtype, p.device, p in ours, f"{name}.{key}".lstrip("."))
            for name, m in found
            for key, p in m._parameters.items()
            if p is not None
        ]
        self.resting = [k.parameter for k in self.known if not k.trained and (scope is None or k.parameter in scope)]

    def unfrozen(self) -> bool:
        """Whether parameters that were frozen when the census was taken are to train now."""
        return any(p.requires_grad for p in self.resting)

    def changes(self) -> list[str]:
        """What trains unlike its user may think, one line each.

        Raises:
            ValueError: for a parameter of this optimizer that is no longer the model's, or that has moved.

        """
        for owner, key, parameter, dtype, device, trained, _ in self.known:
            now = owner._parameters.get(key)
            if trained and (now is not parameter or parameter.dtype is not dtype or parameter.device != device):
                return self._told()
        for module, children, parameters in self.sizes:
            if len(module._modules) != children or len(module._parameters) != parameters:
                return self._told()
        for module, key, child in self.children:
            if module._modules.get(key) is not child:
                return self._told()
        return []

    def _told(self) -> list[str]:
        here = dict(self.model.named_parameters())
        present = {id(p) for p in here.values()}
        for known in self.known:
            if not known.trained:
                continue
            if id(known.parameter) not in present or known.owner._parameters.get(known.key) is not known.parameter:
                raise ValueError(
                    f"{known.name} is no longer the parameter that this optimizer was built with (replaced, removed or "
                    f"parametrised since): {REBUILD}, or build the optimizer after changing the model"
                )
            if known.parameter.dtype is not known.dtype or known.parameter.device != known.device:
                raise ValueError(
                    f"{known.name} was {known.dtype} on {known.device} when the optimizer was built and is "
                    f"{known.parameter.dtype} on {known.parameter.device} now: {REBUILD}, or build the optimizer after "
                    "moving the model"
                )
        before = {id(known.parameter) for known in self.known}
        return [
            f"{name} was added to the model after the optimizer was built and does not train: {REBUILD}"
            for name, p in here.items()
            if id(p) not in before and p.requires_grad and self.scope is None
        ]
