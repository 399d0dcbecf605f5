"""Numbers between the host and devices: what the host wants to know, read together, and what it tells.

A read makes the host wait until a device has done all that it was given, and the device then waits for the host. So
whoever wants to know a number asks for it and hears it at the next read; a step without measurements has one read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter

import torch
from torch import Tensor

DEVICE = attrgetter("device")
Hear = Callable[[Tensor], None]
Source = Callable[[], "Sequence[float] | Tensor"]


class Readings:
    """Numbers that somebody has asked for and not heard yet."""

    def __init__(self) -> None:
        self._asked: list[tuple[Tensor, Hear]] = []
        self._reads = 0

    def ask(self, numbers: Tensor, hear: Hear) -> None:
        """At the next read, `hear` is called with these numbers [m] in double precision on the host."""
        self._asked.append((numbers, hear))

    def taken(self) -> list[tuple[Tensor, Hear]]:
        """What has been asked, and is asked no longer."""
        asked, self._asked = self._asked, []
        return asked

    @contextmanager
    def whole(self) -> Iterator[None]:
        """If what is done inside ends with an error, nobody hears what was asked in it. What was asked before stays."""
        before, reads = len(self._asked), self._reads
        try:
            yield
        except BaseException:
            del self._asked[before if reads == self._reads else 0 :]
            raise

    def read(self) -> None:
        """Wait once; all who have asked hear their numbers in the order in which they asked."""
        asked = self.taken()
        if not asked:
            return
        self._reads += 1
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
    if len(set(map(DEVICE, scalars))) == 1:
        return torch.stack(list(scalars)).double()
    return torch.stack([own.double().to(scalars[0].device) for own in scalars])


def is_finite(norm: float, value: Tensor) -> bool:
    """Whether a tensor is finite that has this norm: the squares of finite numbers may overflow.

    Torch takes far longer for the largest absolute number on processors.
    """
    return math.isfinite(norm) or bool(torch.isfinite(value).all())


def to_device(values: Sequence[float] | Tensor, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers of the host or of any device on a device; the host does not wait."""
    return on_the_way(values, device, dtype).to(device, non_blocking=True)


def on_the_way(values: Sequence[float] | Tensor, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers of the host where a device can fetch them by itself."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


class Inputs:
    """Numbers of the host that a step works with on devices."""

    def __init__(self) -> None:
        self.seen: list[tuple[Source, torch.device]] = []
        self.fixed: list[Tensor] | None = None
        """In a step that is recorded: the tensors of all inputs, in the order in which they are asked for."""

    def begin(self, fixed: list[Tensor] | None = None) -> None:
        """A step begins. `fixed`: it is to be recorded."""
        self.seen, self.fixed = [], fixed

    def get(self, source: Source, device: torch.device) -> Tensor:
        """What the source gives now, in double precision on a device."""
        self.seen.append((source, device))
        return to_device(source(), device) if self.fixed is None else self.fixed[len(self.seen) - 1]
