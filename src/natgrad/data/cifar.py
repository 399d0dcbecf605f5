"""CIFAR-100 from a local folder of parquet files, as the Hugging Face hub has it: 60,000 images of 32x32."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from natgrad.data.augment import crop_and_flip
from natgrad.data.images import Images, Source, Splits, as_they_are

MEAN, STD = (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)


@dataclass(frozen=True)
class Cifar100(Source):
    """CIFAR-100 with its 100 fine labels, decoded once when loaded."""

    path: str = "data/cifar100"
    """Folder with train-*.parquet and test-*.parquet, as in the hub's uoft-cs/cifar100."""
    augment: bool = True
    """Shift by up to four pixels and mirror, drawn anew for every batch."""
    each_image: bool = False
    """Normalise every image by its own mean and deviation, instead of the channels by those of all images."""

    def shape(self) -> tuple[int, int, int]:
        return (3, 32, 32)

    def classes(self) -> int:
        return 100

    def check(self) -> None:
        for split in ("train", "test"):
            if not self._files(split):
                raise ValueError(
                    f"no {split}-*.parquet in {self.path!r}; --data.path must name a folder of parquet files "
                    "of CIFAR-100 (the hub's uoft-cs/cifar100)"
                )

    def load(self) -> Splits:
        self.check()
        augment = crop_and_flip if self.augment else as_they_are
        return Splits(self._read("train"), self._read("test"), augment)

    def _files(self, split: str) -> list[str]:
        return sorted(str(file) for file in Path(self.path).rglob(f"{split}-*.parquet"))

    def _read(self, split: str) -> Images:
        from datasets import Dataset, Image, disable_progress_bars

        disable_progress_bars()
        table: Any = Dataset.from_parquet([*self._files(split)], keep_in_memory=True)
        table = table.cast_column("img", Image(decode=False))
        images = np.stack([_decode(image["bytes"]) for image in table["img"]])
        labels = torch.tensor(table["fine_label"], dtype=torch.int64)
        return Images(torch.from_numpy(images), labels, classes=100, mean=MEAN, std=STD, each=self.each_image)


def _decode(encoded: bytes) -> np.ndarray:
    """Return an encoded picture as uint8 [3, height, width]."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.uint8).transpose(2, 0, 1)
