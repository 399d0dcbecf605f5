"""A model that FSDP has cut over ranks block by block, so that a pass gathers one block after the other.

A block is a module that a list or sequence of modules holds (the blocks of a transformer, those of a ResNet's stages)
and that has several layers of its own. What is in no block is gathered with the root.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def mesh_of(ranks: int, device: torch.device | str, replicas: int = 1) -> Any:
    """The device mesh of all ranks of the default process group.

    replicas: ranks are so many rows of ranks / replicas shards each (HSDP); 1: all ranks hold one model together.

    Raises:
        ValueError: replicas do not divide the ranks, or leave a rank whole layers.

    """
    from torch.distributed.device_mesh import init_device_mesh

    check_replicas(ranks, replicas)
    kind = torch.device(device).type
    if replicas == 1:
        return init_device_mesh(kind, (ranks,))
    return init_device_mesh(kind, (replicas, ranks // replicas), mesh_dim_names=("replicas", "shards"))


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    """Apply `fully_shard` (FSDP2) to a model's blocks, then to the model, and move it to the mesh's device, in place.

    The model is the same on every rank. It may be on the host, so that no device holds it whole.
    """
    from torch.distributed.fsdp import fully_shard

    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def check_replicas(ranks: int, replicas: int) -> None:
    """Refuse numbers of replicas that leave nothing to cut, or ranks over."""
    if ranks < 2:
        raise ValueError("a model is cut over several ranks, and there is one: take more ranks, or leave it whole")
    if replicas < 1 or ranks % replicas or ranks == replicas:
        able = ", ".join(str(n) for n in range(1, ranks) if ranks % n == 0)
        raise ValueError(f"replicas={replicas} of a model that {ranks} ranks hold: choose of {able}")


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks, outermost ones, in the order of the model. A block that shares a parameter with others is none."""
    uses = Counter(p for module in model.modules() for p in module._parameters.values() if p is not None)

    def alone(block: nn.Module) -> bool:
        own = Counter(p for module in block.modules() for p in module._parameters.values() if p is not None)
        return all(uses[p] == times for p, times in own.items())

    return [block for block in _found(model, inside=False) if alone(block)]


def _found(module: nn.Module, inside: bool) -> Iterator[nn.Module]:
    """inside: a list or sequence holds the module."""
    if inside and not isinstance(module, CONTAINERS) and _layers(module) > 1:
        yield module
        return
    for child in module.children():
        yield from _found(child, isinstance(module, CONTAINERS))


def _layers(module: nn.Module) -> int:
    return sum(1 for one in module.modules() if any(p is not None for p in one._parameters.values()))


def whole_of(tensor: Any) -> Any:
    """A tensor that is cut over ranks, whole on every rank; all ranks must call it. Others as they are."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
