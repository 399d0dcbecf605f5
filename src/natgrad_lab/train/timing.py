"""Where a step's time went, and what a second-order optimizer tells of it."""

import time
from typing import Any

import torch
from torch.optim import Optimizer


class Clock:
    """Seconds by stage; waits for the device, so that a stage's work counts where it was asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Count the time since the last lap to a stage."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.laps[stage] = self.laps.get(stage, 0.0) + now - self.last
        self.last = now

    @property
    def total(self) -> float:
        return sum(self.laps.values())


def own_seconds(optimizer: Optimizer) -> dict[str, float]:
    """Return the seconds by stage that an optimizer counts itself, since it was made."""
    return dict(getattr(optimizer, "seconds", {}))


def split(laps: dict[str, float], before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Split the optimizer's lap into the stages that it has counted itself."""
    inner = {stage: seconds - before.get(stage, 0.0) for stage, seconds in after.items()}
    measured = inner.get("measure", 0.0) + inner.get("checksum", 0.0)  # by hooks, while the network runs
    told = sum(inner.values()) - inner.get("update", 0.0) - measured
    rest = {"network": max(0.0, laps["network"] - measured), "update": max(0.0, laps["update"] - told)}
    return {**laps, **inner, **rest}


def second_order(optimizer: Optimizer) -> dict[str, Any]:
    """Return what a second-order optimizer tells of its last step; nothing for others."""
    if not hasattr(optimizer, "intervals"):
        return {}
    told: Any = optimizer
    return {
        "damping": told.param_groups[0]["damping"],
        "refreshed": told.refreshed,
        "skipped": told.skipped,
        "dropped": told.engine.dropped,
        "retries": told.engine.retries,
        "preconditioned": told.preconditioned.share,
        "intervals": told.intervals(),
        "traffic": told.traffic(),
        **({} if told.noise_scale is None else {"noise_scale": told.noise_scale}),
        **({} if told.last_step is None else told.last_step._asdict()),
    }
