"""Where the parameters of layers stand in their modules. FSDP puts what it has gathered there for a pass."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from natgrad.layers import Layer

Slot = tuple[int, int]
"""A layer's place in the list of watched layers, and a place among its parameters."""


class Slots:
    """The slots of layers' parameters, found while these stand in them."""

    def __init__(self, layers: Mapping[int, Layer]):
        self._slots: list[tuple[Slot, nn.Module, str, nn.Parameter]] = []
        for k, layer in layers.items():
            for place, parameter in enumerate(layer.parameters):
                found = slot_of(layer.module, parameter)
                if found is not None:
                    self._slots.append(((k, place), *found, parameter))
        self.forget()

    def forget(self) -> None:
        """Let go of what has stood in the slots."""
        self.standing: dict[Slot, nn.Parameter] = {}  # others than the layers' own parameters
        self._known: dict[int, tuple[nn.Parameter, Slot, nn.Module, str]] = {}

    def look(self) -> None:
        """Take what stands in the slots now."""
        for slot, module, key, own in self._slots:
            there = module._parameters.get(key)
            if there is not None and there is not own and there.shape == own.shape:
                self.standing[slot] = there
                self._known.setdefault(id(there), (there, slot, module, key))

    def find(self, parameter: nn.Parameter) -> Slot | None:
        """The slot in which a parameter stands, the first one of those that share it, as far as `look` has seen."""
        known = self._known.get(id(parameter))
        if known is None or known[0] is not parameter:
            return None
        _, slot, module, key = known
        return slot if module._parameters.get(key) is parameter else None


def slot_of(around: nn.Module, parameter: nn.Parameter) -> tuple[nn.Module, str] | None:
    """The module in which a parameter stands, and its key there."""
    for module in around.modules():
        for key, own in module._parameters.items():
            if own is parameter:
                return module, key
    return None
