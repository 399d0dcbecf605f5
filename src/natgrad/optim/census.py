"""The parameters that a model had when its optimizer was built, to notice at every step what has changed since."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from operator import is_
from typing import NamedTuple

import torch
from torch import nn

from natgrad.parallel import is_sharded

REBUILD = "call optimizer.rebuild()"
SHARDED_SINCE = (
    "fully_shard was applied after the optimizer was built, which trains the parameters of before: build the optimizer "
    "after fully_shard(model)"
)


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
        self.modules = [m for _, m in found]
        self.sizes, self.counts = [len(m._modules) for m in self.modules], [len(m._parameters) for m in self.modules]
        self.children = [(m, key) for _, m in found for key in m._modules]
        self.child = [child for _, m in found for child in m._modules.values()]
        self.known = [
            Known(m, key, p, p.dtype, p.device, p in ours, f"{name}.{key}".lstrip("."))
            for name, m in found
            for key, p in m._parameters.items()
            if p is not None
        ]
        known = [k for k in self.known if k.trained]  # column by column: a step compares lists without a loop
        self.owners, self.keys = [k.owner for k in known], [k.key for k in known]
        self.parameters = [k.parameter for k in known]
        self.dtypes, self.devices = [k.dtype for k in known], [k.device for k in known]
        self.resting = [k.parameter for k in self.known if not k.trained and (scope is None or k.parameter in scope)]

    def unfrozen(self) -> bool:
        """Whether parameters that were frozen when the census was taken are to train now."""
        return any(p.requires_grad for p in self.resting)

    def moved(self) -> bool:
        """Whether a parameter of this optimizer is of another type or on another device than it was."""
        same = all(map(is_, [p.dtype for p in self.parameters], self.dtypes))
        return not (same and [p.device for p in self.parameters] == self.devices)

    def changes(self) -> list[str]:
        """What trains unlike its user may think, one line each.

        Raises:
            ValueError: for a parameter of this optimizer that is no longer the model's.

        """
        now = [owner._parameters.get(key) for owner, key in zip(self.owners, self.keys)]
        alike = (
            all(map(is_, now, self.parameters))
            and [len(m._modules) for m in self.modules] == self.sizes
            and [len(m._parameters) for m in self.modules] == self.counts
            and all(map(is_, [m._modules.get(key) for m, key in self.children], self.child))
        )
        return [] if alike else self._told()

    def _told(self) -> list[str]:
        here = dict(self.model.named_parameters())
        present = {id(p) for p in here.values()}
        if any(map(is_sharded, here.values())) and not any(is_sharded(k.parameter) for k in self.known if k.trained):
            raise ValueError(SHARDED_SINCE)
        for known in self.known:
            if not known.trained:
                continue
            if id(known.parameter) not in present or known.owner._parameters.get(known.key) is not known.parameter:
                raise ValueError(
                    f"{known.name} is no longer the parameter that this optimizer was built with (replaced, removed or "
                    f"parametrised since): {REBUILD}, or build the optimizer after changing the model"
                )
        before = {id(known.parameter) for known in self.known}
        return [
            f"{name} was added to the model after the optimizer was built and does not train: {REBUILD}"
            for name, p in here.items()
            if id(p) not in before and p.requires_grad and self.scope is None
        ]
