"""Batches for benchmarks: noisy class patterns, or images of CIFAR-100 where a folder of them is at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from natgrad.data import Cifar100

CLASSES = 100


class Data:
    """Batches of so many images, always the same ones from the same seed. `path`: a folder of CIFAR-100, or ""."""

    def __init__(self, seed: int, batch: int, path: str, device: str, layout: torch.memory_format):
        self.batch, self.device, self.layout = batch, device, layout
        self.generator = torch.Generator().manual_seed(seed)
        self.patterns = torch.randn(CLASSES, 3, 32, 32, generator=self.generator)
        self.images = Cifar100(path).load().train if path else None

    def __call__(self) -> tuple[Tensor, Tensor]:
        images, labels = self._real() if self.images else self._patterns()
        return images.to(self.device, memory_format=self.layout), labels.to(self.device)

    def _real(self) -> tuple[Tensor, Tensor]:
        assert self.images is not None
        return self.images.batch(torch.randint(0, len(self.images), (self.batch,), generator=self.generator))

    def _patterns(self) -> tuple[Tensor, Tensor]:
        labels = torch.randint(0, CLASSES, (self.batch,), generator=self.generator)
        return self.patterns[labels] + torch.randn(self.batch, 3, 32, 32, generator=self.generator), labels
