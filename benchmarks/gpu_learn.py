"""CIFAR-100's ResNet-32 in batches of 16,384, for as many epochs as the time allows: SP-NGD, then SGD for as many.

Without a folder of images, noisy patterns of the same shape show the throughput and nothing else; rows say which.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from natgrad.parallel import World
from natgrad_lab.data import Cifar100, Images, Source, Splits
from natgrad_lab.data.augment import CropFlip
from natgrad_lab.data.cifar import MEAN, STD
from natgrad_lab.models import CifarResNet
from natgrad_lab.schedules import Cosine, WarmUp
from natgrad_lab.train.loop import Job, Step, prepare, steps
from natgrad_lab.train.optimizers import Settings, Sgd, SpNgd
from natgrad_lab.train.recipe import Recipe

DECAY = 5e-4
RATE = 3.2 / 16_384  # SGD's, for each image of the batch
MOST_EPOCHS = 200
JUDGED = 0.1  # of the time is kept for building and for judging
FIRST = 0.6  # of the time is SP-NGD's


@dataclass(frozen=True)
class Patterns(Source):
    """Images that are noise around a pattern for each class."""

    count: int = 50_000
    kinds: int = 100

    def shape(self) -> tuple[int, int, int]:
        return (3, 32, 32)

    def classes(self) -> int:
        return self.kinds

    def load(self) -> Splits:
        generator = torch.Generator().manual_seed(0)
        patterns = torch.randn(self.kinds, *self.shape(), generator=generator)

        def drawn(count: int) -> Images:
            labels = torch.randint(self.kinds, (count,), generator=generator)
            noise = torch.randn(count, *self.shape(), generator=generator)
            raw = noise.mul_(40).add_(patterns[labels], alpha=40).add_(128).clamp_(0, 255).byte()
            return Images(raw, labels, self.kinds, MEAN, STD)

        return Splits(drawn(self.count), drawn(self.count // 5), CropFlip(4))


@dataclass(frozen=True)
class Size:
    """A run's network and batch."""

    depth: int = 32
    batch: int = 16_384
    micro: int = 2048
    images: int = 50_000
    most: int = MOST_EPOCHS


def optimizers(size: Size) -> dict[str, Settings]:
    """As in the recipes `cifar100_resnet32_16k_*`."""
    return {
        "SPNGD": SpNgd(lr=0.1, weight_decay=DECAY),
        "SGD, Nesterov": Sgd(lr=RATE * size.batch, momentum=0.9, nesterov=True, weight_decay=DECAY),
    }


def recipe(size: Size, data: str, optimizer: Settings, epochs: float) -> Recipe:
    """One run; `data` is a folder of images, or nothing for patterns."""
    return Recipe(
        Cifar100(data) if data else Patterns(size.images),
        CifarResNet(depth=size.depth),
        optimizer,
        WarmUp(Cosine(), length=0.1),
        batch=size.batch,
        micro_batch=size.micro,
        epochs=epochs,
        precision="bfloat16",
        channels_last=True,
    )


def learn(size: Size, data: str, device: torch.device, end: float) -> Iterator[dict[str, Any]]:
    """A row an optimizer. SP-NGD gets as many epochs as fit, SGD as many as that, both with a whole schedule."""
    splits = recipe(size, data, Sgd(), 1).data.load().to(device)
    epochs = 0
    for name, optimizer in optimizers(size).items():
        own = (end - time.monotonic()) * (1 - JUDGED)
        if not epochs:
            own *= FIRST
            trial = prepare(replace(recipe(size, data, optimizer, 1), steps=3), World.alone(), splits)
            rate = max(step.images_per_second for step in steps(trial))
            epochs = max(1, min(size.most, int(own * rate / len(splits.train))))
            del trial
            own = (end - time.monotonic()) * (1 - JUDGED) * FIRST
        job = prepare(recipe(size, data, optimizer, epochs), World.alone(), splits)
        yield row(name, job, data, epochs, time.monotonic() + own)


def row(name: str, job: Job, data: str, epochs: int, end: float) -> dict[str, Any]:
    """Train to the end of the schedule or of the time, and judge."""
    taken: list[Step] = list(steps(job, lambda: time.monotonic() > end))
    losses: dict[int, list[float]] = {}
    for step in taken:
        losses.setdefault(math.ceil(step.epoch - 1e-9), []).append(step.loss)
    score = job.score()
    return {
        "name": name,
        "data": "CIFAR-100" if data else "patterns, which say nothing about accuracy",
        "batch": job.recipe.batch,
        "epochs": epochs,
        "steps": len(taken),
        "whole_schedule": len(taken) == job.steps,
        "seconds": round(taken[-1].elapsed, 2),
        "step_ms": round(1e3 * statistics.median(step.seconds for step in taken), 2),
        "images_per_second": round(sum(step.seconds * step.images_per_second for step in taken) / taken[-1].elapsed),
        "measured": round(statistics.fmean(step.second_order.get("refreshed", 0.0) for step in taken), 4),
        "loss_by_epoch": [round(statistics.fmean(own), 4) for own in losses.values()],
        "finite": all(math.isfinite(step.loss) for step in taken),
        "test_loss": round(score.loss, 4),
        "test_accuracy": round(score.accuracy, 4),
    }
