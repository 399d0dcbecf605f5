"""A run whose model is cut over ranks (FSDP2, HSDP): which settings it can have, and how the model is cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from natgrad.parallel import check_replicas, mesh_of, shard
from natgrad_lab.train.recipe import Recipe


@dataclass(frozen=True)
class Sharded:
    """Every rank holds a part of each parameter, of its gradient and of the optimizer's vectors.

    replicas: how many ranks hold each part (HSDP above 1).
    """

    replicas: int = 1

    def check(self, recipe: Recipe, ranks: int) -> None:
        """Raise ValueError for what cannot be cut, before data are read."""
        if ranks < 2:
            raise ValueError("--shard cuts a model over ranks, and there is one: add --ranks, or leave --shard out")
        try:
            check_replicas(ranks, self.replicas)
        except ValueError as error:
            raise ValueError(f"{error}; set --replicas") from None
        name = type(recipe.optimizer).__name__
        if not recipe.optimizer.cuttable:
            raise ValueError(
                f"{name} needs whole layers on every rank, and --shard cuts them: leave --shard out, or choose an "
                "optimizer of natgrad, Sgd, AdamW or RmsProp"
            )
        if recipe.channels_last:
            raise ValueError("channels_last=True does not work with --shard, which cuts contiguous weights alone")
        if recipe.micro_batch == 1:
            raise ValueError(
                "micro_batch=1 does not work with --shard: a rank with fewer samples would pass through the network "
                "less often than others; set --micro-batch 2"
            )

    def cut(self, model: nn.Module, ranks: int, device: torch.device) -> nn.Module:
        """Cut a model, block by block, and move each rank's parts to its device."""
        return shard(model, mesh_of(ranks, device, self.replicas))
