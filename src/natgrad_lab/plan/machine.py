"""A machine as a planner sees it: rates by kind of operation and size, what a launch costs, links, and where from.

A machine is one of those known by name (machines.py) or a JSON file of the same fields, such as the one that
`natgrad plan --calibrate FILE` writes. Rates of arithmetic are operations a second by the matrices' short side, those
of memory bytes a second by the bytes of one operation; between the sizes given they are interpolated, both logarithmic.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from natgrad.layers.op_cost import COMPUTE, Kind, OpCost

Table = tuple[tuple[float, float], ...]
KINDS: tuple[str, ...] = get_args(Kind)


class Link(NamedTuple):
    """What joins ranks: seconds for a message to begin, bytes a second for it to go on."""

    latency: float
    bandwidth: float


class Spent(NamedTuple):
    """Seconds of one stage: of the device, of the host that launches for it, of messages."""

    device: float = 0.0
    host: float = 0.0
    links: float = 0.0
    beside: bool = False
    """Whether the device works while the host launches what comes next."""

    @property
    def seconds(self) -> float:
        """The time that the stage takes."""
        return self.links + (max(self.device, self.host) if self.beside else self.device + self.host)

    def times(self, count: float) -> Spent:
        """The same, so many times."""
        return self._replace(device=count * self.device, host=count * self.host, links=count * self.links)

    def __add__(self, other: Spent) -> Spent:  # type: ignore[override]
        """One stage after the other."""
        return Spent(
            self.device + other.device, self.host + other.host, self.links + other.links, self.beside or other.beside
        )

    @property
    def parts(self) -> dict[str, float]:
        """The time by what it is waited for: where device and host work beside each other, the slower one."""
        device, host = self.device, self.host
        if self.beside:
            device, host = (device, 0.0) if device >= host else (0.0, host)
        return {"device": device, "host": host, "links": self.links}


@dataclass(frozen=True)
class Machine:
    """Hosts of several devices each, alike.

    A "gpu" works while its host launches what comes next, so a stage takes the longer of the two; a "cpu" does one
    after the other. `between.bandwidth` is that of a whole host, all its devices together.
    """

    name: str
    device: Literal["cpu", "gpu"]
    rates: Mapping[str, Table]
    launch: float
    """Seconds of the host for one operation."""
    memory: float
    """Bytes of one device."""
    devices: int
    """Devices of a host; of a CPU, cores that each run one rank."""
    inside: Link
    between: Link
    crowding: float = 1.0
    """How much longer work takes where all devices of a host are busy, as they share memory."""
    together: float = 1.0
    """How much longer operations take one after the other in a network than each alone, again and again."""
    layer: float = 0.0
    """Seconds of the host for a layer's part in one step, beside its operations: half of it on every rank, half at its
    owner."""
    refresh: float = 0.0
    """The same for a layer's part in measuring and factoring, where it is measured."""
    call: float = 0.0
    """Seconds of the host for beginning one message."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where each figure is from."""

    def rate(self, work: OpCost) -> float:
        """Operations or bytes a second of one kind at this size."""
        size = work.size if work.kind in COMPUTE else work.bytes / max(work.calls, 1.0)
        return interpolated(self.rates[work.kind], max(size, 1.0))

    def device_seconds(self, work: OpCost) -> float:
        """What an operation takes where it runs: its arithmetic or its memory, whichever is longer."""
        if work.kind not in COMPUTE:
            return work.bytes / self.rate(work)
        memory = interpolated(self.rates["elementwise"], max(1.0, work.bytes / max(work.calls, 1.0)))
        return max(work.flops / self.rate(work), work.bytes / memory)

    def seconds(self, works: Iterable[OpCost], ranks: int, host: float = 0.0, launches: float | None = None) -> float:
        """One rank's time for these operations while `ranks` ranks work.

        host: seconds of Python beside them. launches: operations that the host issues; None: as the works say.
        """
        return self.spent(works, ranks, host, launches).seconds

    def spent(
        self, works: Iterable[OpCost], ranks: int, host: float = 0.0, launches: float | None = None, links: float = 0.0
    ) -> Spent:
        """What `seconds` is made of. links: seconds of messages."""
        works, share = list(works), self.share(ranks)
        busy = self.together * sum(self.device_seconds(work) for work in works)
        host += self.launch * (sum(work.calls for work in works) if launches is None else launches)
        return Spent(share * busy, share * host, links, self.device == "gpu")

    def share(self, ranks: int) -> float:
        """How much longer work takes beside other ranks of the host."""
        here = min(ranks, self.devices)
        crowded = 1 + (self.crowding - 1) * (here - 1) / max(1, self.devices - 1)
        return crowded * (max(1.0, ranks / self.devices) if self.one_host else 1.0)

    @cached_property
    def one_host(self) -> bool:
        """Whether there is no second host, so that more ranks than devices share them."""
        return self.between.bandwidth <= 0

    def described(self) -> dict[str, Any]:
        """The machine as plain values, to be written as JSON."""
        return asdict(self)


def interpolated(table: Table, size: float) -> float:
    """The rate at a size: that of the nearest one outside of the table."""
    below = [pair for pair in table if pair[0] <= size]
    above = [pair for pair in table if pair[0] >= size]
    if not below or not above:
        return (below or above)[-1 if below else 0][1]
    (x0, y0), (x1, y1) = below[-1], above[0]
    if x0 == x1:
        return y0
    part = math.log(size / x0) / math.log(x1 / x0)
    return y0 * (y1 / y0) ** part


def read(path: Path) -> Machine:
    """A machine from a JSON file; what is wrong with it is said in one line."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"machine {str(path)!r} is no readable JSON file: {error}") from error
    return machine_of(plain, str(path))


def machine_of(plain: Any, where: str) -> Machine:
    """A machine from plain values, checked."""
    names = [f.name for f in fields(Machine)]
    missing = [n for n in NEEDED if not isinstance(plain, dict) or n not in plain]
    if missing:
        raise ValueError(f"machine {where!r} lacks {', '.join(missing)}; natgrad plan --calibrate writes a whole one")
    if unknown := sorted(set(plain) - set(names)):
        raise ValueError(f"machine {where!r} has a field {unknown[0]!r}; known are {', '.join(names)}")
    try:
        rates = {kind: tuple((float(s), float(r)) for s, r in sorted(plain["rates"][kind])) for kind in KINDS}
        links = {name: Link(**plain[name]) if isinstance(plain[name], dict) else Link(*plain[name]) for name in LINKS}
        machine = Machine(**{**plain, "rates": rates, **links})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"machine {where!r} has rates or links of another form: {error!r}; {FORM}") from error
    check(machine, where)
    return machine


NEEDED = ("name", "device", "rates", "launch", "memory", "devices", "inside", "between")
LINKS = ("inside", "between")
FORM = 'give rates as {"conv": [[size, operations a second], ...], ...} of every kind, links as [latency, bandwidth]'


def check(machine: Machine, where: str) -> None:
    """Refuse numbers that no machine has."""
    positive = [("launch", machine.launch), ("memory", machine.memory), ("devices", machine.devices)]
    positive += [(f"rates of {kind}", min((r for _, r in table), default=0)) for kind, table in machine.rates.items()]
    positive += [("inside.bandwidth", machine.inside.bandwidth)]
    for name, value in positive:
        if not value > 0:
            raise ValueError(f"machine {where!r}: {name}={value:g} must be above 0")
    if machine.device not in ("cpu", "gpu"):
        raise ValueError(f"machine {where!r}: device={machine.device!r} is unknown; give cpu or gpu")
