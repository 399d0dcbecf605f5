"""What the host wants to know of devices, read together.

A read makes the host wait until a device has done all that it was given, and the device then waits for the host. So
whoever wants to know a number asks for it and hears it at the next read; a step without measurements has one read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Hear = Callable[[Tensor], None]


class Readings:
    """Numbers that somebody has asked for and not heard yet."""

    def __init__(self) -> None:
        self._asked: list[tuple[Tensor, Hear]] = []
        self.count = 0  # times that the host has waited

    def ask(self, numbers: Tensor, hear: Hear) -> None:
        """At the next read, `hear` is called with these numbers [m] in double precision on the host."""
        self._asked.append((numbers, hear))

    def drop(self) -> None:
        """A step has come to nothing: nobody hears what was asked."""
        self._asked.clear()

    def read(self) -> None:
        """Wait once; all who have asked hear their numbers in the order in which they asked."""
        asked, self._asked = self._asked, []
        if not asked:
            return
        self.count += 1
        for (_, hear), values in zip(asked, on_host([numbers for numbers, _ in asked])):
            hear(values)


def on_host(numbers: Sequence[Tensor]) -> list[Tensor]:
    """Tensors in double precision on the host, flat; the host waits once for each device that has some of them."""
    flat = [own.detach().reshape(-1).double() for own in numbers]
    found = list(flat)
    for device in dict.fromkeys(own.device for own in flat):
        places = [k for k, own in enumerate(flat) if own.device == device]
        joined = torch.cat([flat[k] for k in places]).cpu()
        for k, own in zip(places, joined.split([len(flat[k]) for k in places])):
            found[k] = own
    return found


def together(scalars: Sequence[Tensor]) -> Tensor:
    """Scalars as one vector in double precision, on the device of the first one."""
    if len({(own.dtype, own.device) for own in scalars}) == 1:
        return torch.stack(list(scalars)).double()
    return torch.stack([own.double().to(scalars[0].device) for own in scalars])


def to_device(values: Sequence[float] | Tensor, device: torch.device) -> Tensor:
    """Numbers of the host in double precision on a device; the host does not wait."""
    tensor = torch.as_tensor(values, dtype=torch.float64)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
