"""What curvature is made of: statistics that a backward pass leaves behind, and formulas over them.

A Moment is a mean over samples. Micro-batches, ranks and time may average it. Rows (rows.py) are something of each
sample: micro-batches and ranks stack them, time replaces them. Both are measured in two moves, because inputs are at
hand in the forward pass and gradients in the backward pass: `before` looks at a layer's input and keeps what little it
needs, `after` looks at the output's gradient, `close` ends a backward pass (a layer called twice in it hands in two
parts).

Gradients reach the hooks as the loss sends them, g_hook = w g with w the weight of a sample in the loss (1/n for a
mean). A part is a sum over samples of w-scaled products; `order` says how often w is in it, so that whoever knows
all samples of a step can turn sums into means: order 0 is a mean already, order 2 is to be multiplied by n.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from natgrad.layers.layer import Layer, Shape
from natgrad.layers.op_cost import OpCost

EXACT_ROWS = 16_384  # up to so many rows the output moment is one cheap pass (docs/math.md)
LEAST_ROWS = 4_096
LEAST_SAMPLES = 64  # whole samples for norms (docs/math.md)
WORTH = 64  # samples that one row per dimension is worth in A's noise, measured (docs/math.md)
ROWS_OF_A_SAMPLE = 8  # rows of G that are worth one sample, measured likewise


class Draw(Protocol):
    """Which places or samples of one call of one layer are measured; None means all of them."""

    def __call__(self, total: int, wanted: int) -> Tensor | None:
        """`wanted` places of `total`, one in each of equal strata, sorted: for rows, which are gathered anyway."""
        ...

    def every(self, total: int, wanted: int) -> slice | None:
        """One of every `step` samples from a random first on, at least `wanted` but for the last: a view, no copy."""
        ...


class Cost(NamedTuple):
    """What a curvature asks for, in multiplications and numbers held."""

    measure: float
    factors: Mapping[str, float]
    precondition: float
    numbers: int

    @property
    def work(self) -> float:
        """Multiplications that fall to the layer's owner when everything is refreshed."""
        return sum(self.factors.values()) + self.precondition


class Extent(NamedTuple):
    """What a layer sees in one step of all ranks: samples, and places of each."""

    samples: int
    places: int


@dataclass(frozen=True)
class Statistic(ABC):
    """One statistic of one layer.

    `draws`: whether every "call" draws rows of its own, all calls of a "layer" in a forward pass draw the same samples
    (a sample's calls are to be added up), or "all" layers do.
    """

    key = "?"
    draws: ClassVar[Literal["call", "layer", "all"]] = "call"

    @abstractmethod
    def before(self, layer: Layer, x: Tensor, draw: Draw, output: Tensor | None = None) -> Any:
        """What to keep of the layer's input until the backward pass (and may be read off its output's graph)."""

    @abstractmethod
    def after(self, layer: Layer, kept: Any, dy: Tensor, draw: Draw) -> Any:
        """The part of one call, from what was kept and the output's gradient: of a Moment, a tensor or a RowSum."""

    def shifted(self, part: Any, before: int) -> Any:
        """The part of a call that did not see the first `before` samples of those that are measured."""
        return torch.cat([part.new_zeros(before, *part.shape[1:]), part])

    def work(self, layer: Layer, x: Tensor, y: Tensor, ranks: int) -> tuple[OpCost, ...]:
        """What measuring one call on x that gave y takes on one of `ranks` ranks. Both may be on the meta device."""
        raise NotImplementedError(f"{type(self).__name__} does not say what measuring takes")


class RowSum(NamedTuple):
    """The part of one call of a moment of order 0 in which not every row counts: their sum, and how many there are.

    rows: [1], or [b] where blocks have unlike numbers of rows, in double precision on the layer's device.
    """

    total: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Moment(Statistic):
    """A mean over samples. `rows_per_dim`: rows measured for each dimension of the statistic; None measures all."""

    rows_per_dim: int | None = None
    order = 2
    symmetric = True

    @abstractmethod
    def shape(self, layer: Layer) -> tuple[int, ...]:
        """The statistic's fixed shape."""

    def effective_samples(self, layer: Layer, samples: int, predictions: int) -> int:
        """How many samples the statistic of a step is worth: two measurements differ by as much as theirs.

        samples: of the step. predictions: all that their losses are means of, such as the characters of texts; what is
        a sum over rows has that many terms that know little of each other. Staleness asks, lest it takes the noise of
        bounded samples for a change (docs/math.md).
        """
        return predictions

    def close(self, parts: list[Tensor]) -> Tensor:
        """The statistic of one forward pass from the parts of its calls. Those of an order 0 weigh by their rows."""
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def close_all(self, parts: Sequence[list[Tensor]]) -> list[Tensor]:
        """`close` for several layers."""
        return [self.close(own) for own in parts]

    @property
    def additive(self) -> bool:
        """Whether parts may be added up as they come, of whichever pass they are."""
        return type(self).close is Moment.close


class Curvature(ABC):
    """How one layer's Fisher looks: pure formulas over its statistics. Subclasses are frozen dataclasses.

    `damps_at_apply`: an inverse serves every damping, which acts in `precondition` instead of `factor`.
    """

    name: str
    statistics: tuple[Any, ...]  # Moments, or one Rows
    damps_at_apply = False
    damping_tolerance = 0.1  # a relative change of damping above this makes the inverses due
    joint = False  # layers are inverted together, elsewhere
    multiplies = False  # `precondition` does nothing with inverses but `@`, so it may be given SymmetricSlabs

    @abstractmethod
    def split(self, traces: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        """The damping [b] of each statistic, from the mean eigenvalues [b] of all of them."""

    @abstractmethod
    def factor(self, key: str, statistic: Tensor, damping: Tensor) -> tuple[Tensor, Tensor | None]:
        """The damped inverses of a statistic's blocks, and which blocks [b] have one (None: all).

        Block by block: the statistics of several layers may be handed in as one, blocks behind blocks.
        """

    def mend(self, key: str, statistic: Tensor, damping: Tensor) -> tuple[Tensor, int]:
        """`factor` where some blocks had no inverse: with more damping for those, and the retries that it took."""
        raise NotImplementedError(f"{type(self).__name__}.factor may fail, but there is no mend")

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what `factor` makes of a statistic of this shape."""
        return shape

    @abstractmethod
    def precondition(self, inverses: Mapping[str, Tensor], gradient: Tensor, damping: float) -> Tensor:
        """The damped natural gradient [b, o, i] of a gradient [b, o, i].

        Unless the curvature `damps_at_apply`, the damping is in the inverses already. Where the curvature `multiplies`,
        large symmetric inverses come as SymmetricSlabs.
        """

    @abstractmethod
    def dense(self, statistics: Mapping[str, Tensor], shape: Shape, damping: float) -> Tensor:
        """The damped Fisher block that `precondition` inverts [numel, numel], for tests; W is flattened (b, o, i)."""

    @abstractmethod
    def cost(self, layer: Layer, rows: int) -> Cost:
        """What a refresh over `rows` rows and a step cost."""

    def measure_work(self, layer: Layer, key: str, x: Tensor, y: Tensor, ranks: int) -> tuple[OpCost, ...]:
        """What measuring one statistic in one call on x that gave y takes on one of `ranks` ranks.

        A statistic that does not say counts with its part of `cost`.
        """
        statistic = next(s for s in self.statistics if s.key == key)
        if type(statistic).work is Statistic.work:
            rows = layer.count(x)[0] * layer.count(x)[1]
            return (OpCost("gemm", 2 * self.cost(layer, rows).measure / len(self.statistics), 0.0, layer.shape.out),)
        return statistic.work(layer, x, y, ranks)

    def factor_work(self, layer: Layer, key: str, seen: Extent) -> tuple[OpCost, ...]:
        """What `factor` takes for one statistic, at its holder."""
        side = (multiplications := self.cost(layer, seen.samples).factors[key]) ** (1 / 3)
        return (OpCost("inverse", 2 * multiplications, 0.0, side, 6),)

    def precondition_work(self, layer: Layer, seen: Extent) -> tuple[OpCost, ...]:
        """What `precondition` takes, at the owner."""
        return (OpCost("gemm", 2 * self.cost(layer, seen.samples).precondition, 0.0, layer.shape.out, 2),)

    def rows_held(self, layer: Layer, seen: Extent) -> int:
        """Bytes that the owner holds of what was measured, beside statistics of a fixed shape and their inverses."""
        return 0


def block_diagonal(blocks: Tensor) -> Tensor:
    """Blocks [b, d, d] as one matrix [b*d, b*d]."""
    return torch.block_diag(*blocks)


def part_of(wanted: int, ranks: int) -> int:
    """How many of `wanted` rows or samples one of `ranks` ranks draws."""
    return max(1, round(wanted / ranks))


def wanted_rows(rows_per_dim: int, dimension: int) -> int:
    """Rows for an input moment of this dimension: their number sets its error, not the batch (docs/math.md)."""
    return math.ceil(rows_per_dim * dimension)
