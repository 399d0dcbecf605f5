"""CIFAR-10 and CIFAR-100, 60,000 images of 32x32, from a local folder of parquet files as the hub has them."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from natgrad.data.augment import CropFlip
from natgrad.data.images import Images, Source, Splits, as_they_are
from natgrad.data.subsets import drawn, first_classes, shrunk

MEAN, STD = (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)
SIZES = (32, 16, 8, 4)
MEAN_10, STD_10 = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)


@dataclass(frozen=True)
class Cifar(Source):
    """What both have in common; a kind says its number of classes, its scale and its column of labels."""

    path: str = ""
    """Folder with train-*.parquet and test-*.parquet."""
    augment: bool = True
    """Shift by up to an eighth of the size (four pixels of 32) and mirror, drawn anew for every batch."""
    each_image: bool = False
    """Normalise every image by its own mean and deviation, instead of the channels by those of all images."""
    size: int = 32
    """Height and width, by averaging squares of pixels: 32, 16, 8 or 4."""
    keep_classes: int | None = None
    """Only images of so many classes, the first ones, for small experiments; None: all."""
    subset: int | None = None
    """Only so many of the training images, every class in proportion, always the same ones; None: all."""

    hub = column = ""
    kinds: ClassVar[int]
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size={self.size} must be one of {', '.join(map(str, SIZES))}; set --data.size")
        if self.keep_classes is not None and not 2 <= self.keep_classes <= self.kinds:
            raise ValueError(
                f"keep_classes={self.keep_classes} must be between 2 and {self.kinds}; set --data.keep-classes"
            )
        if self.subset is not None and self.subset < 1:
            raise ValueError(f"subset={self.subset} must be positive; set --data.subset")

    def shape(self) -> tuple[int, int, int]:
        return (3, self.size, self.size)

    def classes(self) -> int:
        return self.keep_classes or self.kinds

    def check(self) -> None:
        for split in ("train", "test"):
            if not self._files(split):
                raise ValueError(
                    f"no {split}-*.parquet in {self.path!r}; --data.path must name a folder of parquet files "
                    f"of CIFAR-{self.kinds} (the hub's {self.hub})"
                )

    def load(self) -> Splits:
        self.check()
        train, test = (
            shrunk(first_classes(self._read(split), self.classes()), self.size) for split in ("train", "test")
        )
        train = train if self.subset is None else drawn(train, self.subset)
        return Splits(train, test, CropFlip(self.size // 8) if self.augment else as_they_are)

    def _files(self, split: str) -> list[str]:
        return sorted(str(file) for file in Path(self.path).rglob(f"{split}-*.parquet"))

    def _read(self, split: str) -> Images:
        from datasets import Dataset, Image, disable_progress_bars

        disable_progress_bars()
        table: Any = Dataset.from_parquet([*self._files(split)], keep_in_memory=True)
        if not {"img", self.column} <= set(table.column_names):
            raise ValueError(
                f"{self.path!r} has the columns {', '.join(table.column_names)}, not img and {self.column} as "
                f"CIFAR-{self.kinds} has; --data.path must name the files of the hub's {self.hub}"
            )
        table = table.cast_column("img", Image(decode=False))
        images = np.stack([_decode(image["bytes"]) for image in table["img"]])
        labels = torch.tensor(table[self.column], dtype=torch.int64)
        return Images(torch.from_numpy(images), labels, self.kinds, self.mean, self.std, each=self.each_image)


@dataclass(frozen=True)
class Cifar100(Cifar):
    """CIFAR-100 with its 100 fine labels, decoded once when loaded."""

    path: str = "data/cifar100"
    """Folder with train-*.parquet and test-*.parquet, as in the hub's uoft-cs/cifar100."""

    hub, column, mean, std = "uoft-cs/cifar100", "fine_label", MEAN, STD
    kinds = 100


@dataclass(frozen=True)
class Cifar10(Cifar):
    """CIFAR-10 with its ten labels, decoded once when loaded."""

    path: str = "data/cifar10"
    """Folder with train-*.parquet and test-*.parquet, as in the hub's uoft-cs/cifar10."""

    hub, column, mean, std = "uoft-cs/cifar10", "label", MEAN_10, STD_10
    kinds = 10


def _decode(encoded: bytes) -> np.ndarray:
    """Return an encoded picture as uint8 [3, height, width]."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.uint8).transpose(2, 0, 1)
