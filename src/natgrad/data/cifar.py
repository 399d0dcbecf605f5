"""CIFAR-10 and CIFAR-100, 60,000 images of 32x32, from a local folder of parquet files as the hub has them."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from natgrad.data.augment import crop_and_flip
from natgrad.data.images import Images, Source, Splits, as_they_are

MEAN, STD = (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)
MEAN_10, STD_10 = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)


@dataclass(frozen=True)
class Cifar(Source):
    """What both have in common; a kind says its number of classes, its scale and its column of labels."""

    path: str = ""
    """Folder with train-*.parquet and test-*.parquet."""
    augment: bool = True
    """Shift by up to four pixels and mirror, drawn anew for every batch."""
    each_image: bool = False
    """Normalise every image by its own mean and deviation, instead of the channels by those of all images."""

    hub = column = ""
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]

    def shape(self) -> tuple[int, int, int]:
        return (3, 32, 32)

    def check(self) -> None:
        for split in ("train", "test"):
            if not self._files(split):
                raise ValueError(
                    f"no {split}-*.parquet in {self.path!r}; --data.path must name a folder of parquet files "
                    f"of CIFAR-{self.classes()} (the hub's {self.hub})"
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
        if not {"img", self.column} <= set(table.column_names):
            raise ValueError(
                f"{self.path!r} has the columns {', '.join(table.column_names)}, not img and {self.column} as "
                f"CIFAR-{self.classes()} has; --data.path must name the files of the hub's {self.hub}"
            )
        table = table.cast_column("img", Image(decode=False))
        images = np.stack([_decode(image["bytes"]) for image in table["img"]])
        labels = torch.tensor(table[self.column], dtype=torch.int64)
        return Images(torch.from_numpy(images), labels, self.classes(), self.mean, self.std, each=self.each_image)


@dataclass(frozen=True)
class Cifar100(Cifar):
    """CIFAR-100 with its 100 fine labels, decoded once when loaded."""

    path: str = "data/cifar100"
    """Folder with train-*.parquet and test-*.parquet, as in the hub's uoft-cs/cifar100."""

    hub, column, mean, std = "uoft-cs/cifar100", "fine_label", MEAN, STD

    def classes(self) -> int:
        return 100


@dataclass(frozen=True)
class Cifar10(Cifar):
    """CIFAR-10 with its ten labels, decoded once when loaded."""

    path: str = "data/cifar10"
    """Folder with train-*.parquet and test-*.parquet, as in the hub's uoft-cs/cifar10."""

    hub, column, mean, std = "uoft-cs/cifar10", "label", MEAN_10, STD_10

    def classes(self) -> int:
        return 10


def _decode(encoded: bytes) -> np.ndarray:
    """Return an encoded picture as uint8 [3, height, width]."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.uint8).transpose(2, 0, 1)
