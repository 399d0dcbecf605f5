"""One step of one optimizer on so many ranks of a machine: seconds by stage, bytes by kind, memory by rank.

Ranks wait for each other at every message, so a stage that all share is as long as on any rank, and what owners do
between two messages as long as at the busiest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from natgrad.cell import Cell
from natgrad.curvature.base import Seen
from natgrad.curvature.rowwork import Form
from natgrad.layers.work import moved
from natgrad.plan.ghost import Built, Message, state_by_rank
from natgrad.plan.links import seconds
from natgrad.plan.machine import Machine
from natgrad.plan.messages import Step
from natgrad.plan.work import PLAIN, Owned, Parts, factor_work, owned

STAGES = ("forward", "backward", "statistics", "messages", "factorisation", "preconditioning", "update", "gather")
FRESH = ("statistics", "messages", "factorisation")
LARGEST = 12  # layers that are shown


@dataclass(frozen=True)
class Account:
    """An optimizer on the ranks of a machine, ready to be asked."""

    built: Built
    model: nn.Module
    parts: Parts
    machine: Machine

    @property
    def ranks(self) -> int:
        return self.built.world.size

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def form(self, cell: Cell) -> Form:
        """The rows of a cell whose statistic is rows."""
        form = getattr(cell.curvature, "form", None)
        if form is None:
            name = type(cell.curvature).__name__
            raise ValueError(f"{name} does not say how large its rows are: give it a method form, as SampleSpace has")
        return form(cell.layer, self.parts.seen[cell.name])

    def held(self, cell: Cell) -> int:
        """Bytes of measured rows at a cell's owner."""
        seen = self.parts.seen.get(cell.name)
        return 0 if seen is None or not cell.curvature.statistics else cell.curvature.rows_held(cell.layer, seen)

    def sent(self, fresh: bool) -> tuple[list[Message], dict[str, int]]:
        """Every message of a step, and the bytes by kind as `World.sent` counts them on the last rank."""
        return Step(self.built, self.form).send(self.model, fresh)

    def stages(self, fresh: bool) -> tuple[dict[str, float], str]:
        """Seconds by stage, and the largest factor of the busiest owner."""
        messages, _ = self.sent(fresh)
        last = [m for m in messages if m.kind in ("weights", "directions")]
        early = [m for m in messages if m not in last]
        found = dict.fromkeys(STAGES, 0.0)
        found["forward"] = self._seconds(self.parts.forward())
        found["backward"] = self._seconds(self.parts.backward())
        found["messages"] = seconds(early, self.machine, self.ranks) + self._packing(fresh)
        found["gather"] = seconds(last, self.machine, self.ranks) + self._unpacking()
        if fresh:
            found["statistics"] = self._measuring()
        busiest, name = self._owners(fresh)
        found |= busiest
        self._hide(found, messages)
        self._look_again(found)
        return found, name

    def _seconds(self, work: Sequence[Any], host: float = 0.0) -> float:
        return self.machine.seconds(work, self.ranks, host)

    def _measuring(self) -> float:
        """Hooks at work; with sampled labels after one more backward pass."""
        by_layer = self.parts.measure(self.built.cells)
        total = self._seconds(
            [w for works in by_layer.values() for w in works], len(by_layer) * self.machine.refresh / 2
        )
        if by_layer and self.built.second is not None and self.built.second.engine.sampled:
            total += self._seconds(self.parts.backward(weights=False))
        return total

    def _packing(self, fresh: bool) -> float:
        """Norms of all gradients, and what goes into buffers and out of them."""
        optimizer = self.built.second
        if optimizer is None:
            return self._seconds([moved(self.parameters, 5, calls=20)]) if self.ranks > 1 else 0.0
        work = [moved(self.parameters, 1, calls=len(optimizer.cells))]
        if self.ranks > 1:
            work.append(moved(self.parameters, 4, calls=4 * len(optimizer.cells)))
            numbers = self.numbers() if fresh else 0
            work.append(moved(numbers, 4, calls=10 * len(optimizer.cells) if numbers else 0))
        return self._seconds(work)

    def _unpacking(self) -> float:
        if self.ranks == 1 or self.built.second is None or not self.built.world.owners:
            return 0.0
        return self._seconds([moved(self.parameters, 4, calls=4 * len(self.built.cells))])

    def numbers(self) -> int:
        """Numbers of all moments, as full squares."""
        total = 0
        for cell in self.built.cells:
            for moment in cell.curvature.statistics if not cell.by_rows else ():
                size = 1
                for side in moment.shape(cell.layer):
                    size *= side
                total += size
        return total

    def _owners(self, fresh: bool) -> tuple[dict[str, float], str]:
        """The busiest owner's stages."""
        if self.built.second is None:
            return {"update": self._seconds([moved(self.parameters, PLAIN, calls=8)])}, ""
        by_rank = [self._owner(one, fresh) for one in owned(self.built, self.parts.seen)]
        busiest = max(range(len(by_rank)), key=lambda rank: sum(by_rank[rank].values()))
        return by_rank[busiest], self._dearest(busiest) if fresh else ""

    def _owner(self, one: Owned, fresh: bool) -> dict[str, float]:
        half = self.machine.refresh / 2 / max(1, len(self.built.cells[0].keys))  # the other half is the hooks'
        return {
            "factorisation": self._seconds(one.factor, one.measured * half) if fresh else 0.0,
            "preconditioning": self._seconds(one.precondition, one.layers * self.machine.layer),
            "update": self._seconds(one.update),
        }

    def _dearest(self, rank: int) -> str:
        """The largest factor of a rank."""
        seen, found = self.parts.seen, {}
        for cell in self.built.cells:
            for key in cell.keys:
                if cell.holders[key] == rank and cell.name in seen:
                    found[f"{cell.name}.{key}"] = self._seconds(factor_work(cell, key, seen[cell.name]))
        return max(found, key=lambda name: found[name], default="")

    def _hide(self, found: dict[str, float], messages: Sequence[Message]) -> None:
        """With overlap, gradients travel behind the backward pass, save for the last bucket (an eighth)."""
        if not self.built.world.overlap or self.ranks == 1:
            return
        travel = seconds([m for m in messages if m.kind == "gradients"], self.machine, self.ranks)
        found["messages"] -= min(travel * 7 / 8, found["backward"])

    def _look_again(self, found: dict[str, float]) -> None:
        """A step along the curvature passes forward twice more."""
        if getattr(self.built.second, "probe", None) is not None:
            found["update"] += 2 * found["forward"] + self._seconds([moved(self.parameters, 10, calls=400)])

    def memory(self) -> dict[str, Any]:
        """Bytes on a rank: the optimizer's state exactly (least, mean, most), all together as an estimate."""
        state = state_by_rank(self.built, self.model, self.held)
        saved = max(trace.saved for trace, _ in self.parts.passes)
        weights = self.parts.passes[0][0].parameters
        flight = 4 * self.numbers() + (4 * self.parameters if self.ranks > 1 else 0)
        return {
            "state": state,
            "weights": weights,
            "gradients": 4 * self.parameters,
            "activations": saved,
            "statistics in flight": flight,
            "total": max(state) + weights + 4 * self.parameters + saved + flight,
        }

    def layers(self) -> list[dict[str, Any]]:
        """The layers that take most, with what they take in each stage when everything is measured."""
        seen, measured = self.parts.seen, self.parts.measure(self.built.cells)
        passes: dict[str, float] = {}
        for trace, count in self.parts.passes:
            for call in trace.calls:
                works = [*call.passes.forward, *(() if call.first else call.passes.inputs), *call.passes.weights]
                taken = count * self._seconds(works)
                passes[call.name] = passes.get(call.name, 0.0) + taken
        rows = [self._layer(cell, seen, passes, measured) for cell in self.built.cells if cell.name in passes]
        return sorted(rows, key=lambda row: -row["seconds"])[:LARGEST]

    def _layer(self, cell: Cell, seen: dict[str, Seen], passes: dict, measured: dict) -> dict[str, Any]:
        what = seen[cell.name]
        factor = self._seconds([w for key in cell.keys for w in factor_work(cell, key, what)])
        direction = self._seconds(list(cell.curvature.precondition_work(cell.layer, what)))
        measuring = self._seconds(measured.get(cell.name, []))
        return {
            "layer": cell.name,
            "shape": "x".join(map(str, cell.layer.shape)),
            "curvature": cell.curvature.name,
            "passes": passes[cell.name],
            "statistics": measuring,
            "factorisation": factor,
            "preconditioning": direction,
            "seconds": passes[cell.name] + measuring + factor + direction,
            "owner": cell.owner,
        }
