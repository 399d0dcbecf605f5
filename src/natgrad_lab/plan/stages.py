"""One step of one optimizer on so many ranks of a machine: seconds by stage, bytes by kind, memory by rank.

Ranks wait for each other at every message, so a stage that all share is as long as on any rank, and what owners do
between two messages as long as at the busiest of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from natgrad.curvature.curvature import Extent
from natgrad.layer_state import LayerState
from natgrad.layers.op_cost import OpCost, moved
from natgrad.parallel import Message
from natgrad_lab.plan.device_work import PLAIN, Owned, Parts, factor_work, owned
from natgrad_lab.plan.fsdp_passes import NOTHING, PassMessages, held
from natgrad_lab.plan.links import among_replicas, one, seconds
from natgrad_lab.plan.machine import Machine, Spent
from natgrad_lab.plan.memory import state_by_rank
from natgrad_lab.plan.rehearsal import LAST, Rehearsal

STAGES = ("forward", "backward", "statistics", "messages", "factorisation", "preconditioning", "update", "gather")
FRESH = ("statistics", "messages", "factorisation")
LARGEST = 12  # layers that are shown
BUCKETED = 20.0  # operations that pack a plain optimizer's gradients


@dataclass(frozen=True)
class Ways:
    """Ways to run a step, each of which changes what is waited for; optimizers have only the first (`graph=True`).

    graph: directions and updates of a step that measures nothing are one CUDA graph. statistics_early: statistics leave
    during the backward pass. weights_late: weights are gathered while the next forward pass runs. inverses_late: a step
    goes on with the last inverses while new ones are made.
    """

    graph: bool = False
    statistics_early: bool = False
    weights_late: bool = False
    inverses_late: bool = False


NONE = Ways()


@dataclass(frozen=True)
class Account:
    """An optimizer on the ranks of a machine, ready to be asked.

    passing: what FSDP sends in one pass, where the model is cut over ranks. budget: the share of a step's passes that
    measuring and factoring may take, None without a limit.
    """

    rehearsal: Rehearsal
    parts: Parts
    machine: Machine
    ways: Ways = NONE
    budget: float | None = None
    passing: PassMessages = NOTHING

    @property
    def ranks(self) -> int:
        return self.rehearsal.world.size

    @property
    def model(self) -> nn.Module:
        return self.rehearsal.model

    @property
    def cells(self) -> list[LayerState]:
        return self.rehearsal.cells

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def shards(self) -> int:
        """Ranks that hold one model together."""
        sharding = self.rehearsal.sharding
        return 1 if sharding is None else sharding.shards

    @property
    def passes(self) -> int:
        """Passes of a step, each over a part of a rank's share."""
        return sum(count for _, count in self.parts.passes)

    def held(self, cell: LayerState) -> int:
        """Bytes of measured rows at a cell's owner."""
        seen = self.parts.seen.get(cell.name)
        return 0 if seen is None or not cell.curvature.statistics else cell.curvature.rows_held(cell.layer, seen)

    def sent(self, fresh: bool) -> tuple[list[Message], dict[str, int]]:
        """Every message of a step, and the bytes by kind as `World.sent` counts them on the first rank; those of FSDP
        before them, which are counted alike.
        """
        done = self.rehearsal.step(fresh)
        early = self.passes * [*self.passing.forward, *self.passing.backward]
        counted = Counter[str]()
        for message in early:
            counted[message.kind] += message.payload
        return [*early, *done.messages], {**counted, **done.sent}

    def launches(self, fresh: bool) -> dict[str, float]:
        """Operations that the host issues in a step beside the network's own passes, by stage."""
        found = dict(self.rehearsal.step(fresh).launches)
        found["statistics"] = found.get("statistics", 0.0) * sum(count for _, count in self.parts.passes)
        if self.ways.graph and not fresh and self.rehearsal.second is not None:
            found |= {"preconditioning": 1.0, "update": 0.0}
        return found

    def stages(self, fresh: bool) -> tuple[dict[str, float], str]:
        """Seconds by stage, and the largest factor of the busiest owner."""
        found, name = self.spent(fresh)
        return {stage: one.seconds for stage, one in found.items()}, name

    def spent(self, fresh: bool) -> tuple[dict[str, Spent], str]:
        """What each stage takes of the device, the host and the links, and the largest factor of the busiest owner."""
        messages = self.rehearsal.step(fresh).messages
        launches = self.launches(fresh)
        last = [m for m in messages if m.kind in LAST]
        early = [m for m in messages if m.kind not in LAST]
        found = dict.fromkeys(STAGES, Spent())
        found["forward"] = self._passed(self.parts.forward(), self.passing.forward)
        found["backward"] = self._passed(self.parts.backward(), self.passing.backward)
        travel = self._travel(early) - self._hidden(early, found["backward"].seconds)
        found["messages"] = self._spent(self._packing(fresh), launches=self._of(launches, "messages"), links=travel)
        travel = self._travel(last)
        if self.ways.weights_late:
            travel -= min(travel, found["forward"].seconds)
        found["gather"] = self._spent(self._unpacking(), launches=launches.get("gather", 0.0), links=travel)
        if fresh:
            found["statistics"] = self._measuring(launches.get("statistics", 0.0))
        busiest, name = self._owners(fresh, launches)
        found |= busiest
        if self.ways.inverses_late:  # made while the device waits for messages and for its host
            idle = sum(one.seconds - one.device for stage, one in found.items() if stage != "factorisation")
            late = found["factorisation"]
            found["factorisation"] = late.times(max(0.0, 1 - idle / late.seconds) if late.seconds else 0.0)
        return found, name

    def _travel(self, messages: Sequence[Message]) -> float:
        """Seconds of these messages one after the other."""
        return seconds(messages, self.machine, self.ranks, self.rehearsal.world.per_host)

    def _passed(self, work: Sequence[OpCost], messages: Sequence[Message]) -> Spent:
        """Passes, and as much of FSDP's messages as they do not hide: on GPUs what is left beside the work, at least
        the longest message, since the first gathering and the last average have nothing to hide behind.
        """
        spent = self._spent(work)
        each = [self._one_of_fsdp(message) for message in messages]
        travel = self.passes * sum(each)
        if travel and self.machine.device == "gpu":
            travel = max(self.passes * max(each), travel - spent.seconds)
        return spent + self._spent((), launches=0.0, links=travel)

    def _one_of_fsdp(self, message: Message) -> float:
        """Seconds of a message among the ranks of a replica, or of an average among replicas."""
        assert self.rehearsal.sharding is not None
        if message.how != "all_reduce":
            return one(message, self.machine, self.shards)
        return among_replicas(message, self.machine, self.rehearsal.sharding.replicas, self.shards)

    def _of(self, launches: dict[str, float], stage: str) -> float:
        """Operations of a stage. A plain optimizer's gradients travel in buckets, as wrappers do it."""
        if self.rehearsal.second is None:
            return BUCKETED if self.ranks > 1 and self.shards == 1 else 0.0
        return launches.get(stage, 0.0)

    def _spent(
        self, work: Sequence[OpCost], host: float = 0.0, launches: float | None = None, links: float = 0.0
    ) -> Spent:
        return self.machine.spent(work, self.ranks, host, launches, links)

    def _seconds(self, work: Sequence[OpCost], host: float = 0.0) -> float:
        return self.machine.seconds(work, self.ranks, host)

    def _measuring(self, launches: float) -> Spent:
        """Hooks at work; with sampled labels after one more backward pass."""
        by_layer = self.parts.measure(self.cells)
        host = len(by_layer) * self.machine.refresh / 2
        found = self._spent([w for works in by_layer.values() for w in works], host, launches)
        if by_layer and self.rehearsal.second is not None and self.rehearsal.second.engine.sampled:
            found += self._spent(self.parts.backward(weights=False))
        return found

    def _packing(self, fresh: bool) -> list[OpCost]:
        """Norms of all gradients, and what goes into buffers and out of them."""
        if self.rehearsal.second is None:
            return [moved(self.parameters, 5)] if self.ranks > 1 and self.shards == 1 else []
        own = self.parameters / self.shards
        work = [moved(own, 1)]
        if self.ranks > 1:
            work += [moved(own, 4), moved(self.numbers() if fresh else 0, 4)]
        return work

    def _unpacking(self) -> list[OpCost]:
        if self.ranks == 1 or self.rehearsal.second is None or not self.rehearsal.world.owners:
            return []
        return [moved(self.parameters / self.shards, 4)]

    def numbers(self) -> int:
        """Numbers of all moments, as full squares."""
        total = 0
        for cell in self.cells:
            for moment in cell.curvature.statistics if not cell.by_rows else ():
                size = 1
                for side in moment.shape(cell.layer):
                    size *= side
                total += size
        return total

    def _owners(self, fresh: bool, launches: dict[str, float]) -> tuple[dict[str, Spent], str]:
        """The busiest owner's stages. Launches are those of the first rank, which owns the most expensive layer."""
        if self.rehearsal.second is None:
            work = [moved(self.parameters / self.shards, PLAIN)]
            return {"update": self._spent(work, launches=launches["update"])}, ""
        by_rank = [self._owner(one, fresh, launches) for one in owned(self.rehearsal, self.parts.seen)]
        busiest = max(range(len(by_rank)), key=lambda rank: sum(one.seconds for one in by_rank[rank].values()))
        found = by_rank[busiest]
        if self.rehearsal.second.method.probe is not None:  # a step along the curvature passes forward twice more
            found["update"] += self._spent(self.parts.forward()).times(2)
            found["update"] += self._spent([moved(self.parameters, 10)], launches=0)
        return found, self._dearest(busiest) if fresh else ""

    def _owner(self, one: Owned, fresh: bool, launches: dict[str, float]) -> dict[str, Spent]:
        half = self.machine.refresh / 2 / max(1, len(self.cells[0].keys))  # the other half is the hooks'
        everyone, own = len(self.cells), one.layers * (not self.ways.graph or fresh)
        python = self.machine.layer / 2 * (everyone + own)
        return {
            "factorisation": self._spent(one.factor, one.measured * half, launches["factorisation"])
            if fresh
            else Spent(),
            "preconditioning": self._spent(one.precondition, python, launches["preconditioning"]),
            "update": self._spent(one.update, launches=launches["update"]),
        }

    def _dearest(self, rank: int) -> str:
        """The largest factor of a rank."""
        seen, found = self.parts.seen, {}
        for cell in self.cells:
            for key in cell.keys:
                if cell.holders[key] == rank and cell.name in seen:
                    found[f"{cell.name}.{key}"] = self._seconds(factor_work(cell, key, seen[cell.name]))
        return max(found, key=lambda name: found[name], default="")

    def _hidden(self, messages: Sequence[Message], backward: float) -> float:
        """What travels behind the backward pass: with overlap all buckets of gradients but the last."""
        hidden = 0.0
        if self.rehearsal.world.overlap and self.ranks > 1:
            hidden += self._travel([m for m in messages if m.kind == "gradients"][:-1])
        if self.ways.statistics_early:
            hidden += self._travel([m for m in messages if m.kind == "statistics"])
        return min(hidden, backward)

    def memory(self) -> dict[str, Any]:
        """Bytes on a rank: the optimizer's state exactly (least, mean, most), all together as an estimate.

        weights, gradients: of the first rank, which has the most of a model that is cut. gathered: of such a model
        what a pass has whole at a time: the root's parameters, two blocks' (one computes, the next arrives), and
        the gradients of one.
        """
        state = state_by_rank(self.rehearsal, self.held)
        saved = max(trace.saved for trace, _ in self.parts.passes)
        parameters = list(self.model.parameters())
        gradients = held(parameters, self.rehearsal.sharding, 0)
        weights = gradients + held(list(self.model.buffers()), None, 0)
        root, *blocks = [message.payload for message in self.passing.forward] or [0]
        largest = sorted(blocks or [root])[-2:]
        gathered = (root if blocks else 0) + sum(largest) + largest[-1]
        flight = 4 * self.numbers() + (4 * self._whole_at_owner() if self.ranks > 1 else 0)
        return {
            "state": state,
            "weights": weights,
            "gradients": gradients,
            "gathered": gathered,
            "activations": saved,
            "statistics in flight": flight,
            "total": max(state) + weights + gradients + gathered + saved + flight,
        }

    def _whole_at_owner(self) -> int:
        """Numbers that a rank packs: all gradients; of a cut model the gradients and directions of what it owns."""
        if self.shards == 1:
            return self.parameters
        owned = Counter[int]()
        for cell in self.cells:
            owned[cell.owner] += 2 * cell.layer.numel
        return max(owned.values(), default=0)

    def layers(self) -> list[dict[str, Any]]:
        """The layers that take most, with what they take in each stage when everything is measured."""
        seen, measured = self.parts.seen, self.parts.measure(self.cells)
        passes: dict[str, float] = {}
        for trace, count in self.parts.passes:
            for call in trace.calls:
                works = [*call.passes.forward, *(() if call.first else call.passes.inputs), *call.passes.weights]
                taken = count * self._seconds(works)
                passes[call.name] = passes.get(call.name, 0.0) + taken
        rows = [self._layer(cell, seen, passes, measured) for cell in self.cells if cell.name in passes]
        return sorted(rows, key=lambda row: -row["seconds"])[:LARGEST]

    def _layer(self, cell: LayerState, seen: dict[str, Extent], passes: dict, measured: dict) -> dict[str, Any]:
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
