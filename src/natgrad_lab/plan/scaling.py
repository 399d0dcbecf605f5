"""The whole plan: every optimizer on every number of ranks, as the plain values that tables and pages are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.parallel import Message
from natgrad.refresh import Every
from natgrad_lab.plan.device_work import Parts
from natgrad_lab.plan.fsdp_passes import NOTHING, PassMessages, pass_messages
from natgrad_lab.plan.machine import Machine
from natgrad_lab.plan.rehearsal import rehearsal_of
from natgrad_lab.plan.stages import NONE, STAGES, Account, Ways
from natgrad_lab.plan.trace import Trace, on_meta, trace
from natgrad_lab.train.optimizers import Settings

UNLIMITED = 1e6
"""Steps whose work a rehearsed step may spend on measuring."""
PIECE = 64
"""Samples of a pass that is rehearsed. Hooks take larger ones in more pieces, which the work of these hides."""


@dataclass(frozen=True)
class Network:
    """A network by the function that builds it, and what it is given."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: int = 0

    def inputs(self, samples: int) -> Tensor:
        """So many samples."""
        kind = torch.long if self.tokens else torch.get_default_dtype()
        return torch.zeros(samples, *self.shape, dtype=kind)


class Planner:
    """Traces a network once for each share of a batch, and accounts for optimizers on it."""

    def __init__(self, network: Network, machine: Machine, micro_batch: int | None = None, replicas: int | None = None):
        self.network, self.machine, self.micro_batch = network, machine, micro_batch
        self.replicas = replicas  # of a model that several ranks hold together
        self._passing: dict[int, PassMessages] = {}
        self._traces: dict[int, Trace] = {}
        self.model = on_meta(network.make, network.name)  # no optimizer's hooks are on it

    def parts(self, share: int, ranks: int) -> Parts:
        """A rank's share of samples, at most `micro_batch` at a time."""
        most = min(self.micro_batch or share, share)
        whole, rest = divmod(share, most)
        passes = [(self._trace(most), whole)] + ([(self._trace(rest), 1)] if rest else [])
        return Parts(passes, ranks)

    def _trace(self, samples: int) -> Trace:
        if samples not in self._traces:
            one = self.network
            self._traces[samples] = trace(self.model, one.shape, samples, one.name, one.tokens)
        return self._traces[samples]

    def passing(self, ranks: int) -> PassMessages:
        """What FSDP sends in a pass; nothing where models are whole."""
        if self.replicas is None or ranks == 1:
            return NOTHING
        if ranks not in self._passing:
            one = self.network
            self._passing[ranks] = pass_messages(one.make, lambda: one.inputs(2), ranks, self.replicas)
        return self._passing[ranks]

    def account(self, settings: Settings, ranks: int, batch: int, ways: Ways = NONE) -> Account:
        """One optimizer on so many ranks, `batch` samples a step over all of them."""
        if batch % ranks:
            near = max(ranks, batch // ranks * ranks)
            raise ValueError(f"batch={batch} is not divisible by {ranks} ranks; take --batch {near} or other --ranks")
        replicas = None if ranks == 1 else self.replicas
        if replicas is not None and not settings.cuttable:
            raise ValueError(f"{type(settings).__name__} needs whole layers on every rank; leave --shard out")
        graph = getattr(settings, "graph", False)
        if graph and replicas is not None:
            raise ValueError("graph=True cannot record a step on a model that fully_shard has cut; leave it out")
        if graph:  # there is no GPU to record it on
            plain: dict[str, Any] = {"graph": False}
            settings, ways = replace(settings, **plain), replace(ways, graph=True)
        budget = getattr(settings, "refresh_share", None)
        if budget is not None:  # a step that measures everything is rehearsed, whatever a step may spend
            unlimited: dict[str, Any] = {"refresh_share": UNLIMITED}
            settings = replace(settings, **unlimited)
        share = batch // ranks
        parts = self.parts(share, ranks)
        with torch.device("meta"):
            inputs = self.network.inputs(share)
        model = on_meta(self.network.make, self.network.name)  # of its own: no other optimizer's hooks are on it
        once = min(share, self.micro_batch or PIECE)
        rehearsal = rehearsal_of(settings, model, inputs, ranks, parts.form, once, replicas)
        if graph and rehearsal.second is not None:
            rehearsal.second.refuse_graphs()
        return Account(rehearsal, parts, self.machine, ways, budget, self.passing(ranks))


def share_of(account: Account, adaptive: float) -> float:
    """The share of all statistics that an average step measures; `adaptive`: where they say so themselves."""
    cells = [cell for cell in account.cells if cell.curvature.statistics]
    if not cells:
        return 0.0
    rules = [cell.staleness() for cell in cells]
    return sum(1 / rule.steps if isinstance(rule, Every) else adaptive for rule in rules) / len(rules)


def afforded(account: Account, share: float, fresh: Mapping[str, float]) -> float:
    """The same under a budget: as much as fits into its share of both passes."""
    work = fresh["statistics"] + fresh["factorisation"]
    if account.budget is None or not work:
        return share
    return min(share, account.budget * (fresh["forward"] + fresh["backward"]) / work)


def row(account: Account, batch: int, adaptive: float, steps: int | None) -> dict[str, Any]:
    """One optimizer on one number of ranks."""
    share = share_of(account, adaptive)
    (stale, _), (fresh, holds) = account.stages(False), account.stages(share > 0)
    share = afforded(account, share, fresh)
    (few, counted), (many, counted_fresh) = account.sent(False), account.sent(share > 0)
    average = {stage: stale[stage] + share * (fresh[stage] - stale[stage]) for stage in STAGES}
    wire = {"stale": travelled(few, account.ranks), "fresh": travelled(many, account.ranks)}
    wire["average"] = wire["stale"] + share * (wire["fresh"] - wire["stale"])
    step = {"stale": sum(stale.values()), "fresh": sum(fresh.values()), "average": sum(average.values())}
    return {
        "ranks": account.ranks,
        "batch": batch,
        "share": share,
        "stages": {"stale": stale, "fresh": fresh, "average": average},
        "step": step,
        "bytes": {"stale": counted, "fresh": counted_fresh},
        "wire": wire,
        "memory": account.memory(),
        "run": None if steps is None else {"steps": steps, "seconds": steps * step["average"]},
        "holds": holding(fresh, holds),
    }


def travelled(messages: Sequence[Message], ranks: int) -> float:
    """Bytes that a rank passes on, the mean over ranks: of an all-reduce twice its payload, of what goes from rank to
    rank its part.
    """
    parts = {"all_reduce": 2.0, "exchange": 1 / ranks, "all_to_all": 1 / ranks}
    return sum(m.payload * parts.get(m.how, 1.0) for m in messages)


def holding(stages: Mapping[str, float], dearest: str) -> str:
    """What the step waits for longest, where everything is measured."""
    stage = max(stages, key=lambda name: stages[name])
    return f"{stage} ({dearest})" if stage == "factorisation" and dearest else stage


def scaled(
    planner: Planner,
    optimizers: Mapping[str, Settings],
    worlds: Sequence[tuple[int, int]],
    adaptive: float,
    steps_of: Callable[[int], int | None],
) -> dict[str, Any]:
    """Rows of every optimizer on every (ranks, batch); the layers of the first one on the fewest and the most ranks."""
    found: dict[str, Any] = {"optimizers": [], "layers": {}}
    for name, settings in optimizers.items():
        rows = []
        for ranks, batch in worlds:
            account = planner.account(settings, ranks, batch)
            rows.append(row(account, batch, adaptive, steps_of(batch)))
            if name == next(iter(optimizers)) and (ranks, batch) in (worlds[0], worlds[-1]):
                found["layers"][str(ranks)] = account.layers()
        found["optimizers"].append({"name": name, "kind": type(settings).__name__, "rows": rows})
    return found
