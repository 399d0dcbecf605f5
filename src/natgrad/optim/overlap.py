"""Gradients that travel while the backward pass still runs: fixed buckets, sent to their owners as they fill.

Buckets hold parameters from the model's end to its beginning, the order in which gradients arrive, and leave in this
order on every rank: a bucket that is full waits for those before it. What has no gradient when the step comes goes
then, as zeros. Nothing is sent within `paused`, so micro-batches add up first.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from natgrad.layers.layer import real
from natgrad.parallel import OwnedTensor, World
from natgrad.readings import together

LARGEST = 25 * 2**20  # bytes of a bucket
SHARES = 4  # a small model's gradients go in about so many buckets


class Overlap:
    """The buckets of one model's gradients. `owners` is the rank of every parameter, in the model's order; gradients
    are divided by `scale` before they leave.
    """

    def __init__(
        self, world: World, parameters: Sequence[nn.Parameter], owners: Sequence[int], scale: Callable[[], float]
    ):
        self.world, self.scale = world, scale
        self.owners = dict(zip(parameters, owners))
        self.buckets = fill(list(reversed(parameters)))
        self.place = {p: k for k, bucket in enumerate(self.buckets) for p in bucket}
        self.resting = False
        self.reset()
        for parameter in parameters:
            if parameter in _hooks:  # of an optimizer that this one replaces
                _hooks[parameter].remove()
            _hooks[parameter] = parameter.register_post_accumulate_grad_hook(_Hook(self))

    def reset(self) -> None:
        """Begin a step."""
        self.missing = [set(bucket) for bucket in self.buckets]
        self.under_way: list[Callable[[], list[Tensor | None]]] = []
        self.norms: dict[nn.Parameter, Tensor] = {}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let gradients add up; nothing leaves."""
        before, self.resting = self.resting, True
        try:
            yield
        finally:
            self.resting = before

    def arrived(self, parameter: nn.Parameter) -> None:
        if self.resting:
            return
        k = self.place[parameter]
        if k < len(self.under_way):
            raise ValueError(
                "a gradient arrived after it had been sent: with World(overlap=True) put every backward() of a step "
                "but the last in opt.no_sync()"
            )
        self.missing[k].discard(parameter)
        while len(self.under_way) < len(self.buckets) and not self.missing[len(self.under_way)]:
            self._send()

    def _send(self) -> None:
        """The next bucket leaves."""
        if not self.under_way:
            self.world.sent.clear()
        bucket = self.buckets[len(self.under_way)]
        present = [p for p in bucket if p.grad is not None]
        gradients = [p.grad for p in present if p.grad is not None]
        if gradients:
            self.norms |= zip(present, torch._foreach_norm(gradients))
        with torch.no_grad():
            scale = self.scale()
            values = [real(torch.zeros_like(p) if p.grad is None else p.grad.to_dense()) for p in bucket]
            parcels = [OwnedTensor(v if scale == 1 else v / scale, self.owners[p]) for p, v in zip(bucket, values)]
            self.under_way.append(self.world.begin(parcels, "gradients"))

    def flush(self) -> None:
        """Send what has not left yet. Every rank does, so that all have sent the same messages."""
        while len(self.under_way) < len(self.buckets):
            self._send()

    def norms_then_and_now(self) -> Tensor:
        """The norms of the gradients as they left, and of the same gradients as they are [2, gradients]."""
        pairs = [(norm, p.grad) for p, norm in self.norms.items() if p.grad is not None]
        if not pairs:
            return torch.zeros(2, 0)
        return together([*(n for n, _ in pairs), *torch._foreach_norm([g for _, g in pairs])]).view(2, -1)

    def check(self, norms: Tensor, scale: float) -> None:
        """Refuse gradients that were changed after they had left, by their norms then and now [2 * gradients].

        By `scale` they may have been divided.
        """
        sent, here = norms.view(2, -1).unbind()
        ratio = torch.where(sent > 0, here / sent.clamp_min(1e-300), 1.0)
        usable = torch.isfinite(ratio)
        if bool(((ratio - 1).abs().minimum((ratio * scale - 1).abs())[usable] > 1e-2).any()):
            raise ValueError(
                "gradients were changed after they had been sent: with World(overlap=True) clip by max_norm=, or call "
                "opt.average_gradients() first"
            )

    def collect(self) -> dict[nn.Parameter, Tensor]:
        """The sums over ranks of the gradients that this rank owns."""
        self.flush()
        sums: dict[nn.Parameter, Tensor] = {}
        for bucket, wait in zip(self.buckets, self.under_way):
            sums |= {p: value for p, value in zip(bucket, wait()) if value is not None}
        self.reset()
        return sums

    def drop(self) -> None:
        """Give a step up, if it has begun."""
        if self.under_way:
            self.collect()
        self.reset()


_hooks: Any = WeakTensorKeyDictionary()  # a parameter's gradients leave once, whoever was built on it before


class _Hook:
    """Tells the buckets that a gradient has arrived. In a copy of the model it does nothing."""

    def __init__(self, overlap: Overlap | None):
        self.overlap = weakref.ref(overlap) if overlap is not None else lambda: None

    def __call__(self, parameter: Tensor) -> None:
        overlap = self.overlap()
        if overlap is not None and isinstance(parameter, nn.Parameter):
            overlap.arrived(parameter)

    def __reduce__(self) -> tuple:
        return _Hook, (None,)


def fill(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in buckets, in their order, each full once it holds LARGEST bytes or 1 / SHARES of all."""
    sizes = [p.numel() * p.element_size() for p in parameters]
    limit = min(LARGEST, sum(sizes) / SHARES)
    buckets: list[list[nn.Parameter]] = []
    room: Any = 0
    for parameter, size in zip(parameters, sizes):
        if room <= 0:
            buckets.append([])
            room = limit
        buckets[-1].append(parameter)
        room -= size
    return buckets
