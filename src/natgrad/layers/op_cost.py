"""What operations of one kind cost, as a planner counts it: arithmetic, memory that is touched, launches.

Layers state their passes in it, curvatures what measuring, factoring and preconditioning take. What it means in
seconds is a machine's to say (plan/machine.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

Kind = Literal[
    "conv", "conv_backward", "gemm", "gram", "inverse", "cholesky", "eigen", "elementwise", "norm", "gather", "scatter"
]
COMPUTE: tuple[Kind, ...] = ("conv", "conv_backward", "gemm", "gram", "inverse", "cholesky", "eigen")
"""Kinds whose rate is in operations a second; the others' is in bytes a second."""
PRICES: dict[Kind, float] = {"inverse": 3, "cholesky": 4, "eigen": 20, "norm": 20, "gather": 20, "scatter": 60}
"""How many operations of a matrix product pass in the time of one operation of another kind, or of one of its bytes:
rounded from the rates of plan/cpu.json for matrices of some hundred rows. Kinds in COMPUTE that are not here have 1."""
BYTE = 10.0
"""The same for one byte of anything else."""
NUMBER = 4  # bytes: everything here is in single precision


class OpCost(NamedTuple):
    """Some operations of one kind.

    flops: multiplications and additions. bytes: read and written. size: the short side of the matrices, by which rates
    differ (of a convolution: its outputs, or its inputs times the side of its kernel). calls: operations launched, each
    of which costs the host time of its own.
    """

    kind: Kind
    flops: float = 0.0
    bytes: float = 0.0
    size: float = 1.0
    calls: float = 1.0

    def times(self, count: float) -> OpCost:
        """The same, so many times."""
        return self._replace(flops=self.flops * count, bytes=self.bytes * count, calls=self.calls * count)


class Passes(NamedTuple):
    """What one call of a layer takes: its forward pass, and its backward pass in two parts."""

    forward: tuple[OpCost, ...]
    inputs: tuple[OpCost, ...]
    """The gradient of its inputs, which a first layer does not need."""
    weights: tuple[OpCost, ...]
    """The gradient of its parameters."""


def price(works: Iterable[OpCost]) -> float:
    """What work counts where no machine is known, in operations of a matrix product: arithmetic or memory."""
    return sum(priced(work) for work in works)


def priced(work: OpCost) -> float:
    """`price` of one kind of work."""
    if work.kind not in COMPUTE:
        return PRICES.get(work.kind, BYTE) * work.bytes
    return max(PRICES.get(work.kind, 1.0) * work.flops, BYTE * work.bytes)


def product(m: float, k: float, n: float, count: float = 1.0, calls: float = 1.0) -> OpCost:
    """`count` products of [m, k] with [k, n]."""
    touched = NUMBER * count * (m * k + k * n + m * n)
    return OpCost("gemm", 2 * count * m * k * n, touched, min(m, k, n), calls)


def moment_of(rows: float, dimension: float, blocks: float = 1.0) -> OpCost:
    """The sum over `rows` of r r^T for each of `blocks`."""
    touched = NUMBER * blocks * (rows * dimension + dimension**2)
    return OpCost("gram", 2 * blocks * rows * dimension**2, touched, dimension, 3)


def moved(numbers: float, passes: float, kind: Kind = "elementwise", calls: float = 1.0) -> OpCost:
    """So many passes over so many numbers."""
    return OpCost(kind, 0.0, NUMBER * numbers * passes, 1.0, calls)


def launched(calls: float) -> OpCost:
    """Small operations whose memory does not count."""
    return OpCost("elementwise", calls=calls)
