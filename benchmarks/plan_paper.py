"""SP-NGD's own program on its own machine, in the terms of natgrad's plan. See plan_published.py.

Three constants are taken from the published seconds of one GPU, nothing from any other column:

    network   all passes' rates, from what one more backward pass takes (1mc less emp)
    inverse   the rate of Cholesky inverses, from BatchNorm's full blocks (fullBN less unitBN)
    layer     an owner's time for each layer beside its arithmetic, from what emp+unitBN takes besides

Everything else is the plan's: arithmetic, bytes, owners' work by layer, messages. Where the paper's program differs
from ours the model follows the paper: patches written out and multiplied on Tensor Cores, A on its way during the
backward pass, weights sent in half precision, layers given to ranks in equal numbers by their names.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import nn
from torch.optim import Optimizer

from natgrad.layer_state import LayerState
from natgrad.layers.op_cost import OpCost, moment_of, moved
from natgrad.optim import SPNGD
from natgrad.parallel import World
from natgrad_lab.plan.device_work import owned
from natgrad_lab.plan.links import seconds
from natgrad_lab.plan.machine import Machine
from natgrad_lab.plan.machines import SIZES, named
from natgrad_lab.plan.scaling import Planner
from natgrad_lab.plan.stages import Account
from natgrad_lab.train.optimizers import SpNgd

GPUS = tuple(2**k for k in range(11))
PUBLISHED = {
    "1mc+fullBN": (0.813, 0.725, 0.568, 0.493, 0.431, 0.372, 0.333, 0.346, 0.350, 0.362, 0.373),
    "1mc+unitBN": (0.662, 0.592, 0.463, 0.437, 0.372, 0.366, 0.333, 0.344, 0.348, 0.355, 0.361),
    "emp+fullBN": (0.725, 0.641, 0.481, 0.397, 0.336, 0.281, 0.242, 0.251, 0.256, 0.261, 0.267),
    "emp+unitBN": (0.571, 0.508, 0.368, 0.329, 0.267, 0.261, 0.234, 0.238, 0.247, 0.251, 0.263),
    "+stale": (None,) * 7 + (0.178, 0.187, 0.149, 0.188),
}
"""Seconds per step; +stale is emp+unitBN with the paper's adaptive intervals."""
SENT = {128: 0.236, 256: 0.151, 512: 0.054, 1024: 0.078}
"""The share of statistics that still travelled with stale ones (table 2): of the measuring and inverting, too."""
TENSOR_CORES = 125e12
"""Operations a second in half precision (V100 data sheet)."""


@dataclass(frozen=True)
class Assumed:
    """What neither the paper nor a data sheet says; plan_published.py shows what other values would change."""

    achieved: float = 0.4
    """Share of the Tensor Cores' peak for products of rows (as for convolutions)."""
    half: float = 6000.0
    """Size of the inverse that reaches half of the best rate."""
    weights_too: bool = True
    """Whether 1mc's extra backward pass makes the gradients of weights as well (Chainer's backward() does)."""


@dataclass(frozen=True)
class Constants:
    """What the column of one GPU says: factors on rates, and seconds a layer."""

    network: float = 1.0
    inverse: float = 1.0
    layer: float = 0.0


def machine(constants: Constants, assumed: Assumed) -> Machine:
    """ABCI's hosts with these constants. Products of rows are the statistics' alone in this program."""
    base = named("v100-ib")
    best = base.rates["inverse"][-1][1]
    inverse = tuple((size, best * size / (size + assumed.half)) for size in SIZES)
    base = replace(base, rates={**base.rates, "inverse": inverse})
    factors = {"conv": constants.network, "conv_backward": constants.network, "norm": constants.network}
    factors |= {"inverse": constants.inverse}
    rates = {
        kind: tuple((size, rate * factors.get(kind, 1.0)) for size, rate in table) for kind, table in base.rates.items()
    }
    rates["gram"] = tuple(
        (size, rate / rates["gram"][-1][1] * TENSOR_CORES * assumed.achieved) for size, rate in rates["gram"]
    )
    return replace(base, rates=rates, layer=0.0)


def link_name(cell: LayerState) -> tuple:
    """Where a layer stands among all by its name in the release: norms of a block before its convolutions."""
    block, _, rest = cell.name.partition(".")
    norm = cell.layer.kind == "norm"
    if not rest:
        return (0, 0 if norm else 1 if cell.layer.kind == "conv" else 2, 0)
    return (1, int(block), not norm, rest.startswith("shortcut"), rest)


def shared_out(names: Sequence[str], gpus: int) -> dict[str, int]:
    """The rank of every layer, equal numbers of layers to each (numpy's array_split)."""
    share, more = divmod(len(names), gpus)
    ends = [rank for rank in range(gpus) for _ in range(share + (rank < more))]
    return dict(zip(names, ends))


@dataclass(frozen=True)
class Released(SpNgd):
    """SP-NGD with its layers on the ranks on which the release has them."""

    order: tuple[str, ...] = ()

    def build(self, model: nn.Module, world: World) -> Optimizer:
        owners = shared_out(self.order, world.size)

        class Placed(SPNGD):
            def make_cell(self, found, curvature, owner, holders):
                rank = owners.get(found.name, owner)
                return super().make_cell(found, curvature, rank, dict.fromkeys(holders, rank))

        return Placed(model, self.lr, **self.arguments(world))


@cache
def planned(planner: Planner, full: bool, gpus: int) -> Account:
    """The program on so many GPUs; who owns what and what is sent depends on neither the constants nor the rows."""
    plain: dict[str, Any] = {"rows_per_dim": 8, "refresh": 1, "norms": "full" if full else "unitwise"}
    cells = planner.account(SpNgd(**plain), 1, 32).cells
    order = tuple(cell.name for cell in sorted(cells, key=link_name))
    return planner.account(Released(order=order, weights_wire="float16", **plain), gpus, 32 * gpus)


class Published:
    """The paper's program on a machine."""

    def __init__(self, planner: Planner, constants: Constants, assumed: Assumed, sampled: bool, full: bool):
        self.planner, self.constants, self.assumed = planner, constants, assumed
        self.sampled, self.full = sampled, full

    def account(self, gpus: int) -> Account:
        return replace(planned(self.planner, self.full, gpus), machine=machine(self.constants, self.assumed))

    def seconds(self, gpus: int, share: float = 1.0) -> dict[str, float]:
        """Seconds by stage. share: of the statistics in a step."""
        account = self.account(gpus)
        messages, _ = account.sent(True)
        work, parts = account.machine.seconds, account.parts
        found = {"forward": work(parts.forward(), gpus), "backward": work(parts.backward(), gpus)}
        again = work(parts.backward(self.assumed.weights_too), gpus)
        found["sampled labels"] = again if self.sampled else 0.0
        found["statistics"] = share * work(rows_of(account), gpus)
        wide = [m for m in messages if m.kind == "statistics"]
        gradients, weights = ([m for m in messages if m.kind == kind] for kind in ("gradients", "weights"))
        travel = share * seconds(wide, account.machine, gpus)
        inputs = 498.6 / 615.8  # A's part of the bytes (spec), which leaves during the backward pass
        late = max(0.0, inputs * travel - found["backward"]) + (1 - inputs) * travel
        found["messages"] = late + seconds(gradients, account.machine, gpus)
        found["gather"] = seconds(weights, account.machine, gpus)
        return found | self.owner(account, share)

    def owner(self, account: Account, share: float) -> dict[str, float]:
        """The busiest owner: a layer's time falls to its inverse as much as to its step, so half of it is stale too."""
        per_layer = self.constants.layer
        ranks = []
        for one in owned(account.rehearsal, account.parts.seen):
            factor = account.machine.seconds(one.factor, account.ranks)
            direction = account.machine.seconds([*one.precondition, *one.update], account.ranks)
            half = per_layer / 2 * one.layers
            ranks.append({"factorisation": share * (factor + half), "preconditioning": direction + half})
        return max(ranks, key=lambda found: sum(found.values()))


def rows_of(account: Account) -> list[OpCost]:
    """Statistics as the release measures them: every patch is written out in half precision, then multiplied."""
    work: list[OpCost] = []
    for trace, count in account.parts.passes:
        for call in trace.calls:
            n, s = call.layer.count(call.x)
            b, o, i = call.layer.shape
            if call.layer.kind == "norm":
                found = [moved(n * s * b, 5, calls=4)]
            else:
                found = [moved(n * s * i, 1, calls=2), moment_of(n * s, i), moment_of(n * s, o)]
            work += [one.times(count) for one in found]
    return work


def calibrated(planner: Planner, assumed: Assumed) -> Constants:
    """The three constants from the column of one GPU."""
    one = {name: column[0] for name, column in PUBLISHED.items() if column[0] is not None}
    passes = statistics.fmean([one["1mc+fullBN"] - one["emp+fullBN"], one["1mc+unitBN"] - one["emp+unitBN"]])
    blocks = statistics.fmean([one["1mc+fullBN"] - one["1mc+unitBN"], one["emp+fullBN"] - one["emp+unitBN"]])
    constants = Constants()
    for _ in range(8):  # rates and what they explain depend on each other a little
        unit, full = (Published(planner, constants, assumed, True, full).seconds(1) for full in (False, True))
        more = sum(full.values()) - sum(unit.values())
        again = unit.pop("sampled labels")
        left = one["emp+unitBN"] - sum(unit.values())
        constants = Constants(
            constants.network * again / passes,
            constants.inverse * more / blocks,
            max(0.0, constants.layer + left / 107),
        )
    return constants


def variants(planner: Planner, constants: Constants, assumed: Assumed) -> dict[str, list[dict[str, float] | None]]:
    """Predicted stages of every variant on every number of GPUs."""
    found: dict[str, list[dict[str, float] | None]] = {}
    for name in PUBLISHED:
        program = Published(planner, constants, assumed, "1mc" in name, "fullBN" in name)
        shares = [SENT.get(gpus) if name == "+stale" else 1.0 for gpus in GPUS]
        found[name] = [None if share is None else program.seconds(gpus, share) for gpus, share in zip(GPUS, shares)]
    return found


def total(stages: dict[str, float] | None) -> float | None:
    return None if stages is None else sum(stages.values())


def errors(predicted: dict[str, list], columns: Sequence[int]) -> list[float]:
    """Relative errors in these columns."""
    pairs = [(total(predicted[n][GPUS.index(g)]), PUBLISHED[n][GPUS.index(g)]) for n in PUBLISHED for g in columns]
    return [abs(ours / theirs - 1) for ours, theirs in pairs if ours is not None and theirs is not None]
