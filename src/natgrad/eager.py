"""Compiled models run eagerly where they must be seen: a compiled graph calls no functions of torch."""

from __future__ import annotations

from typing import Any

import torch


class WithGradients:
    """A stance of torch.compile: eager where gradients are wanted, compiled elsewhere.

    torch asks for it at every call of something compiled. So an evaluation stays compiled, whichever model it is of.
    """

    skip_guard_eval_unsafe = False
    backend = None

    @property
    def stance(self) -> str:
        """What torch is to do now."""
        return "force_eager" if torch.is_grad_enabled() else "default"


class Eager:
    """The stance of this process: torch has one for all threads and models."""

    def __init__(self) -> None:
        self.own = WithGradients()
        self.before: Any = None  # the stance that was there, while ours is

    def set(self, wanted: bool) -> None:
        """From now on models whose gradients are wanted run eagerly, or no more."""
        if not wanted and self.before is None:
            return
        from torch._dynamo import eval_frame

        there = eval_frame._stance is self.own  # somebody else may have set another one since
        if wanted and not there:
            self.before = eval_frame._set_stance(self.own)  # type: ignore[arg-type]
        elif not wanted:
            if there:
                eval_frame._set_stance(self.before)
            self.before = None
