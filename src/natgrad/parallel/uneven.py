"""Ranks that run out of batches before others: torch's Join context, in which they go on with steps of nothing.

    with torch.distributed.algorithms.join.Join([model, optimizer]):  # the model only where it is wrapped (DDP)
        for batch in batches_of_this_rank: ...

A rank that has left the loop takes part in the others' steps, without gradients and samples, until all are done. An
optimizer takes part by `_join_config`, `join_hook`, `join_device` and `join_process_group`, as torch's Joinable says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def nobody() -> Any:
    """The configuration outside of a Join context."""
    if not dist.is_available():
        return None
    from torch.distributed.algorithms.join import _JoinConfig

    return _JoinConfig.construct_disabled_join_config()


def enabled(joinable: Any) -> bool:
    """Whether a Join context is open around a joinable."""
    return joinable._join_config is not None and bool(joinable._join_config.enable)


def begin(joinable: Any) -> None:
    """A step begins on this rank: those that have run out take part in it."""
    if enabled(joinable):
        from torch.distributed.algorithms.join import Join

        Join.notify_join_context(joinable)


def hook(shadow: Callable[[], None]) -> Any:
    """What a rank that has run out does in every step of the others."""
    from torch.distributed.algorithms.join import JoinHook

    class Shadow(JoinHook):
        def main_hook(self) -> None:
            shadow()

    return Shadow()


def group_of(group: Any) -> Any:
    """A process group, the default one for None."""
    return dist.group.WORLD if group is None else group


def device_of(group: Any) -> torch.device:
    """Where small messages of a group live."""
    if "nccl" in str(dist.get_backend(group)):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
