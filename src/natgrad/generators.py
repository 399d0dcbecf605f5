"""Random numbers that can be drawn again: a generator of a device by its seed."""

from __future__ import annotations

import torch


def generator_on(device: torch.device, seed: int) -> torch.Generator:
    """A generator of this device. Meta tensors have no random numbers of their own and take the host's."""
    return torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)
