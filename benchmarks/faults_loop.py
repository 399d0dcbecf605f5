"""A training loop as a user writes it, on a plain model, under DistributedDataParallel, or cut by fully_shard, with
checkpoints by torch: what the fault campaign disturbs beside the trainer.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import natgrad

STEPS, SAVE_EVERY, BATCH = 12, 2, 48

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "spngd": lambda m, **o: natgrad.SPNGD(m, lr=0.05, rows_per_dim=None, refresh=natgrad.Adaptive(tolerance=0.5), **o),
    "budget": lambda m, **o: natgrad.SPNGD(m, lr=0.05, rows_per_dim=None, refresh=natgrad.Budget(0.1, 1), **o),
    "kfac": lambda m, **o: natgrad.KFAC(m, lr=0.05, rows_per_dim=None, refresh=2, **o),
    "seng": lambda m, **o: natgrad.SENG(m, lr=0.1, samples=None, refresh=3, **o),
    "nlcg": lambda m, **o: natgrad.NLCG(m, lr=0.05, step=natgrad.Scheduled(feedback=None), **o),
    "nlcg_kfac": lambda m, **o: natgrad.NLCG(
        m, lr=0.05, preconditioner=natgrad.spngd_blocks, rows_per_dim=None, step=natgrad.Scheduled(feedback=None), **o
    ),
}


class Net(nn.Module):
    """A convolution, a norm, an embedding of places and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.GroupNorm(2, 6)
        self.gain = nn.Parameter(torch.ones(6, 1, 1))
        self.hidden, self.head = nn.Linear(6 * 16, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(torch.relu(self.norm(self.conv(x))) * self.gain, 2)
        return self.head(torch.relu(self.hidden(x.flatten(1))))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """A batch of all ranks: images whose brightest corner says most of their label."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(5, (BATCH,), generator=generator)
    images = torch.randn(BATCH, 1, 8, 8, generator=generator)
    images[torch.arange(BATCH), 0, labels, labels] += 3
    return images, labels


class Loop:
    """One rank's training into a folder, from the last checkpoint that is there; resumed where it finds one."""

    def __init__(self, out: Path, optimizer: str, how: str, timeout: float) -> None:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        self.out, self.how = out, how
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if ranks > 1 or how != "loop":
            world = natgrad.parallel.join(timeout)
            assert world.size == ranks
        self.rank, self.ranks = rank, ranks
        torch.manual_seed(0)
        self.model: nn.Module = Net()
        if how == "sharded":
            mesh = init_device_mesh("cpu", (ranks,))
            self.model = fully_shard(self.model, mesh=mesh)
        # rows of samples have no shapes before they are measured, so torch's checkpoint does not ask for them
        self.in_parts = how == "sharded" and optimizer != "seng"
        self.passes = self.model
        if how == "ddp":
            # else DDP forms its buckets anew after a run's first step: sums over four ranks then have another order,
            # and a run that was restarted has another last bit, whatever the optimizer
            self.passes = nn.parallel.DistributedDataParallel(self.model, find_unused_parameters=True)
        self.optimizer = OPTIMIZERS[optimizer](self.model, world=natgrad.World(check=1))
        self.done = 0

    def step(self, number: int) -> None:
        """One step on this rank's share."""
        images, labels = (t.chunk(self.ranks)[self.rank] for t in batch(number))
        F.cross_entropy(self.passes(images), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self) -> None:
        """All steps that are left, then the weights as one file."""
        self.load()
        for number in range(self.done, STEPS):
            self.step(number)
            self.done = number + 1
            if self.done % SAVE_EVERY == 0:
                self.save()
        weights = get_model_state_dict(self.model, options=whole())
        if self.rank == 0:
            written(weights, self.out / "model.pt")

    def save(self) -> None:
        """Write a checkpoint that is there when it is whole."""
        name = self.out / f"step-{self.done:04d}"
        if self.in_parts:
            dcp.save(self.parts(), checkpoint_id=f"{name}.part")
            if self.rank == 0:
                Path(f"{name}.part").rename(name)
        else:
            state = self.optimizer.state_dict() if self.how == "ddp" else self.optimizer.gather_state_dict()
            model = get_model_state_dict(self.model, options=whole())
            if self.rank == 0:
                written({"model": model, "optimizer": state}, name)

    def parts(self) -> dict[str, Any]:
        """What torch.distributed.checkpoint writes of a sharded model, and reads into."""
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
        }

    def load(self) -> None:
        """Go on from the last checkpoint, if there is one. All ranks see the same folder."""
        found = sorted(path for path in self.out.glob("step-*") if re.fullmatch(r"step-\d{4}", path.name))
        steps = torch.tensor([float(found[-1].name[5:]) if found else 0.0])
        if self.ranks > 1:
            dist.broadcast(steps, 0)  # a rank may see a file that rank 0 does not see yet
        self.done = int(steps)
        if not self.done:
            return
        path = self.out / f"step-{self.done:04d}"
        if self.in_parts:
            parts = self.parts()
            dcp.load(parts, checkpoint_id=str(path))
            set_model_state_dict(self.model, parts["model"])
            set_optimizer_state_dict(self.model, self.optimizer, parts["optimizer"])
        else:
            saved = torch.load(path, weights_only=True)
            set_model_state_dict(self.model, saved["model"], options=whole())
            self.optimizer.load_state_dict(saved["optimizer"])


def whole() -> Any:
    """What get_model_state_dict is to give: everything, on the host."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def written(value: Any, path: Path) -> None:
    """Write a file in one go."""
    part = path.with_name(path.name + ".part")
    torch.save(value, part)
    part.replace(path)
