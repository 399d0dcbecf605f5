"""The real optimizer takes its steps on ranks that are not there: its owners, state, messages and operations.

`Settings.build` makes the optimizer of a training run on a model without numbers, and a rehearsal lets it step there:
what the step sends and launches is written down as it happens, by the very code that trains.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from natgrad.curvature.curvature import part_of
from natgrad.curvature.per_sample_cost import RowForm
from natgrad.hooks import logits_of
from natgrad.layer_state import LayerState
from natgrad.optim import SecondOrder
from natgrad.parallel import Message, Sharding, World, pretended, sharding_of
from natgrad.sampling import Sampler
from natgrad_lab.plan.fsdp_passes import gathered, shard_on_meta
from natgrad_lab.plan.simulated import Device, SimulatedTransport
from natgrad_lab.train.optimizers import Settings

FAR = 10**6
"""Steps after which a statistic is measured again that is not to be measured now."""
CHECKED = 1 / 8
"""The share of a layer's measurements that have a checksum, its first ones aside (capture.py)."""
LAST = ("weights", "directions")
"""What owners send at the end of a step."""


class Rehearsed(NamedTuple):
    """What one step did.

    messages: every message, in the order in which they were sent. sent: the bytes by kind as `World.sent` counts them
    on this rank. launches: operations that the host issued, by stage, those of the network's own passes left out.
    """

    messages: list[Message]
    sent: dict[str, int]
    launches: dict[str, float]


@dataclass
class Rehearsal:
    """An optimizer on a model without numbers, as one of so many ranks.

    sharding: how the model is cut over them (FSDP2, HSDP); None: every rank has all of it.
    """

    optimizer: Optimizer
    settings: Settings
    model: nn.Module
    inputs: Tensor
    world: World
    transport: SimulatedTransport
    device: Device
    form_of: Callable[[LayerState], RowForm]
    sharding: Sharding | None = None
    _known: dict[bool, Rehearsed] = field(default_factory=dict)

    @property
    def second(self) -> SecondOrder | None:
        """The optimizer, if it knows of curvature."""
        return self.optimizer if isinstance(self.optimizer, SecondOrder) else None

    @property
    def cells(self) -> list[LayerState]:
        """The layers; none for an optimizer that knows of no curvature."""
        return self.optimizer.cells if isinstance(self.optimizer, SecondOrder) else []

    def step(self, fresh: bool) -> Rehearsed:
        """One step after the first. fresh: everything is measured; else nothing is."""
        fresh = fresh and any(cell.statistics for cell in self.cells)
        if not self._known:
            self._begin()
        if fresh not in self._known:
            self._known[fresh] = self._taken(fresh)
        return self._known[fresh]

    def _begin(self) -> None:
        """The first step, which is another one than those after it.

        Statistics count as measured before, so it need not measure; rows have no size until it has.
        """
        if any(cell.by_rows for cell in self.cells):
            self._known[True] = self._taken(fresh=True)
            return
        for cell in self.cells:
            for key in cell.keys:
                cell.set_clock(key, [FAR, 1, 1, 2])
                if self.second is not None:
                    cell.numbers[f"{key}_damping"] = self.second.group_of(cell.layer.parameters[0])["damping"]
        self._taken(fresh=False)

    def _taken(self, fresh: bool) -> Rehearsed:
        """Let the optimizer take a step."""
        optimizer, log, marks = self.second, list[Message](), list[int]()

        def listen(message: Message) -> None:
            log.append(message)
            marks.append(self.device.operations)

        self.world.listener = listen
        self.world.sent.clear()
        if optimizer is not None:
            step = optimizer.steps_made + 1
            for cell in optimizer.cells:
                for key in cell.keys:
                    cell.set_clock(key, [step if fresh else step + FAR, *cell.clock(key)[1:]])
            optimizer.engine.arm(step)
        before = dict(self._seconds())
        with warnings.catch_warnings(), self.device:
            warnings.simplefilter("ignore")
            loss = self._pass() if fresh or self._early() else self._gradients()
            start, checked = self.device.operations, self._checking()
            self.settings.take(self.optimizer, loss, self._again)
            end, compared = self.device.operations, self._checking() - checked
            self.optimizer.zero_grad()
        self.world.listener = None
        if optimizer is not None:
            optimizer.engine.capture.disarm()
        sent = {kind: count for kind, count in self.world.sent.items() if count}
        spent = {name: value - before.get(name, 0.0) for name, value in self._seconds().items()}
        last = next((mark for message, mark in zip(log, marks) if message.kind in LAST), end)
        return Rehearsed(log, sent, self._launches(spent, end - start - compared, end - last))

    def _seconds(self) -> Mapping[str, float]:
        """What the optimizer's clock has counted by stage, which are operations here."""
        return self.second.seconds if self.second is not None else {}

    def _checking(self) -> float:
        """Operations of checksums so far."""
        return self.second.engine.capture.checking if self.second is not None else 0.0

    def _launches(self, spent: Mapping[str, float], whole: float, last: float) -> dict[str, float]:
        """Operations by stage. whole: of `step()`, checksums left out; last: those after owners have begun to send."""
        if self.second is None:
            return {"update": whole}
        inside = {name: spent.get(name, 0.0) for name in ("messages", "factor", "precondition", "update")}
        return {
            "statistics": spent.get("measure", 0.0) + CHECKED * spent.get("checksum", 0.0),
            "messages": inside["messages"] - last,
            "factorisation": inside["factor"],
            "preconditioning": inside["precondition"],
            "update": whole - sum(inside.values()) + inside["update"],
            "gather": last,
        }

    def _early(self) -> bool:
        """Whether gradients leave during the backward pass."""
        return self.world.overlap and self.world.size > 1

    def _pass(self) -> Tensor:
        """A forward and a backward pass, as hooks see them."""
        with gathered(self.model):
            logits = self._logits()
            self.settings.before_backward(self.optimizer, logits)
            logits.backward(torch.empty_like(logits))
        return logits.new_empty(())

    def _logits(self) -> Tensor:
        """The network's output."""
        logits = logits_of(self.model(self.inputs))
        assert logits is not None  # the trace has looked
        return logits

    def _again(self) -> Tensor:
        """One more forward pass, which the passes of the network are charged for."""
        with self.device.uncounted():
            return self.model(self.inputs)

    def _gradients(self) -> Tensor:
        """The gradients that a backward pass would leave, and the loss."""
        for parameter in self.model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        return self.inputs.new_empty((), dtype=torch.get_default_dtype())

    def rows(self) -> list[list[int]]:
        """How many rows of each layer every rank has measured, layer by layer."""
        found = []
        for cell in self.cells:
            if cell.by_rows and cell.statistics:
                wanted = self.form_of(cell).samples
                found.append([quota(wanted, rank, self.world.size) for rank in range(self.world.size)])
        return found


def quota(samples: int, rank: int, size: int) -> int:
    """How many rows a rank has of `samples` of all ranks."""
    sampler = Sampler(0, 0, rank, 1 / size)
    return min(sampler.quota(samples), part_of(samples, size))


def rehearsal_of(
    settings: Settings,
    model: nn.Module,
    inputs: Tensor,
    ranks: int,
    form_of: Callable[[LayerState], RowForm],
    once: int,
    replicas: int | None = None,
) -> Rehearsal:
    """The optimizer that `settings` make, as the first of so many ranks: the owner of the most expensive layer.

    inputs: what this rank gives the model in one step. form_of: the rows of a layer of which all ranks measure rows.
    once: samples of a pass; there are more of them where this rank keeps the rows of more. replicas: the model is cut
    over the ranks, which are so many replicas; None: it is not.
    """
    transport, device = SimulatedTransport(ranks), Device()
    world = World(transport)
    with nullcontext() if replicas is None else pretended(ranks):
        if replicas is not None:
            shard_on_meta(model, ranks, replicas)
        sharding = sharding_of(model, world)
        optimizer = settings.build(model, world)
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None:  # which torch takes on GPUs
            group["foreach"] = True
    if isinstance(optimizer, SecondOrder):
        optimizer.engine.capture.disarm()
        optimizer.engine.count_with(lambda: float(device.operations))
        world = optimizer.world
    made = Rehearsal(optimizer, settings, model, inputs, world, transport, device, form_of, sharding)
    transport.rows = made.rows
    made.inputs = inputs[: max([once, *(row[0] for row in made.rows())])]
    return made
