"""Batches for benchmarks of steps: noisy patterns, or CIFAR-100 from a folder of parquet files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from natgrad_lab.data import Cifar100

CLASSES = 100


class Data:
    """Batches of images, or of noisy class patterns. All contenders see the same ones."""

    def __init__(self, case: Any):
        self.case = case
        self.generator = torch.Generator().manual_seed(case.seed)
        self.patterns = torch.randn(CLASSES, 3, 32, 32, generator=self.generator)
        self.images = Cifar100(case.images).load().train if case.images else None

    def __call__(self) -> tuple[Tensor, Tensor]:
        images, labels = self._real() if self.images else self._patterns()
        return images.to(self.case.device, memory_format=layout(self.case)), labels.to(self.case.device)

    def _real(self) -> tuple[Tensor, Tensor]:
        assert self.images is not None
        return self.images.batch(torch.randint(0, len(self.images), (self.case.batch,), generator=self.generator))

    def _patterns(self) -> tuple[Tensor, Tensor]:
        labels = torch.randint(0, CLASSES, (self.case.batch,), generator=self.generator)
        return self.patterns[labels] + torch.randn(self.case.batch, 3, 32, 32, generator=self.generator), labels


def layout(case: Any) -> torch.memory_format:
    return torch.channels_last if case.channels_last else torch.contiguous_format
