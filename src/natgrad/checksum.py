"""Whether what the hooks saw of a layer accounts for its gradient.

A layer's curvature is its own only if its gradient is the sum over calls and rows of g a^T, with a the input rows and g
the output's gradients that the hooks saw. With random vectors u [b, i] and v [b, o],

    v^T dW u  =  sum over calls and rows of (g . v)(a . u)

holds for every layer that is what its module says, to rounding. It costs rows * (i + o). It fails where the weight is
changed before its use (a mask, a parametrisation, an adapter), where it is used elsewhere too (a tied head), where the
module computes something else (a subclass, an activation inside), and where the loss holds derivatives of the network
(a second backward pass through the first).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from natgrad.generators import generator_on
from natgrad.layers import Layer
from natgrad.layers.layer import at_least_single
from natgrad.readings import to_device, together

ROUNDINGS = 64  # units of rounding by which both sides may differ in single and double precision
MOST_ADDED_UP = 0.03  # of the gradient: where torch itself is further off, nothing could be told
ROUNDINGS_HALF = 4  # the same in half precision, where a unit is nearly a hundredth (docs/math.md)


class Checksum:
    """Both sides of the equation for one layer, added up over the passes of one step."""

    def __init__(self, layer: Layer, seed: int):
        self.weight = weight = layer.parameters[0]  # with which passes compute
        b, o, _ = layer.shape
        options: dict[str, Any] = {
            "generator": generator_on(weight.device, seed),
            "device": weight.device,
            "dtype": at_least_single(weight.dtype),
        }
        self.layer = layer
        self.probe = layer.probe(**options)
        self.u, self.v = layer.written_out(self.probe), torch.randn(b, o, **options)
        self.reset()

    def reset(self) -> None:
        """Begin a step."""
        self.epsilon = torch.finfo(self.weight.dtype).eps
        self.least = 0.0  # what the types on the way cannot hold, or hold with few digits
        self.rows = self.calls = 0
        self.sums: tuple[list[Tensor], ...] = ([], [], [], [])  # claimed, deposited, and the norms of their terms

    def fits(self) -> bool:
        """Whether the layer is still of the type and on the device that this was made for."""
        weight = self.layer.parameters[0]
        return self.u.dtype == at_least_single(weight.dtype) and self.u.device == weight.device

    def look(self, x: Tensor, output: Tensor, form: Layer | None = None, late: bool = False) -> Any:
        """What is needed of a call on x until its output's gradient is known. `form`: the layer as the call uses it."""
        self.round(x.dtype)
        self._see(output)
        return () if late else (form or self.layer).look(x, self.probe, output)

    def claim(self, looked: Any, dy: Tensor, rows: int, form: Layer | None = None, late: Tensor | None = None) -> None:
        """A call's output has the gradient dy: what that adds to the gradient of the weight.

        late: the call's input, where the form exchanges it with dy.
        """
        layer = form or self.layer
        self.calls += 1
        self._see(dy)  # again: gradients may be cleared, and all of this with them, between the passes
        if late is not None:
            x, dy = layer.exchanged(late, dy)
            looked = layer.look(x, self.probe, dy)
        total, norm = layer.bilinear(looked, dy, self.probe, self.v)
        self.sums[0].append(total)
        self.sums[2].append(norm)
        self.rows += rows

    def deposit(self, place: int, gradient: Tensor) -> None:
        """Autograd adds a gradient to the parameter `place` of the layer."""
        direction = self.layer.unpack(self.v.unsqueeze(2) * self.u.unsqueeze(1))[place]
        products = direction.reshape(gradient.shape) * gradient
        self.sums[1].append(products.sum(dtype=torch.float64))
        self.sums[3].append(torch.linalg.vector_norm(products, dtype=torch.float64))

    def _see(self, output: Tensor) -> None:
        """A call has rounded its output as this type and device do."""
        self.round(output.dtype)
        if self.layer.kind != "embedding" and rounds_products(output.device):
            self.epsilon = max(self.epsilon, torch.finfo(torch.bfloat16).eps)

    def round(self, dtype: torch.dtype) -> None:
        """Numbers of this type are on the way from a call to the gradient."""
        if not dtype.is_floating_point:
            return
        # processors add float16 up in float16: five units of its own were seen, as many as one of bfloat16
        self.epsilon = max(self.epsilon, torch.finfo(torch.bfloat16 if dtype == torch.float16 else dtype).eps)
        limits = torch.finfo(dtype)
        least = limits.smallest_normal * (limits.eps if dtype == torch.float16 else 1)  # others need no such numbers
        self.least = max(self.least, least * math.sqrt(self.layer.shape.numel))

    def agrees(self, claimed: float, deposited: float, terms: float, squares: float) -> bool:
        """Whether the two sides are equal to rounding; true where they cannot be compared."""
        difference = abs(claimed - deposited)
        if not math.isfinite(difference):
            return True
        scale = math.sqrt(terms) + math.sqrt(squares)
        roundings = ROUNDINGS
        if self.epsilon > 1e-5:  # half precision, in which autocast also adds up the calls of a layer
            roundings = ROUNDINGS_HALF + math.sqrt(self.calls)
        limit = roundings * self.epsilon + self._added_up()
        return difference <= limit * scale + ROUNDINGS_HALF * self.least

    def _added_up(self) -> float:
        """By how much sums of so many rows may be off that are added up one after the other.

        Rows that are alike are rounded alike, so errors add up: 0.02 to 0.07 units of rounding a row were seen. The
        gradient of a token is such a sum in the type of the weight; in half precision it may come to a standstill.
        """
        weight = self.weight.dtype
        halves = self.layer.kind == "embedding" and weight in (torch.bfloat16, torch.float16)
        epsilon = torch.finfo(weight if halves else at_least_single(weight)).eps
        return min(epsilon * self.rows / 4, 1.0 if halves else MOST_ADDED_UP)


def numbers_of(checks: Sequence[Checksum]) -> Tensor:
    """The two sides of each check and the sums of squares of their terms, four numbers a check, on one device.

    The device squares the norms of all checks together.
    """
    places = [4 * k + side for k, check in enumerate(checks) for side, sums in enumerate(check.sums) for _ in sums]
    terms = [term for check in checks for sums in check.sums for term in sums]
    if not terms:
        return torch.zeros(4 * len(checks), dtype=torch.float64)
    joined = together(terms)
    norms = to_device([place % 4 > 1 for place in places], joined.device, torch.bool)
    joined = torch.where(norms, joined.square(), joined)
    return joined.new_zeros(4 * len(checks)).index_add_(0, to_device(places, joined.device, torch.long), joined)


def rounds_products(device: torch.device) -> bool:
    """Whether torch may round single precision to ten bits or fewer in products on this device."""
    if torch.get_float32_matmul_precision() != "highest":
        return True
    return device.type == "cuda" and bool(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
