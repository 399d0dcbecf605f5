"""CIFAR-10 and CIFAR-100, 60,000 images of 32x32, from the hub or a folder of its parquet files."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from natgrad_lab.data.augment import CropFlip
from natgrad_lab.data.folders import class_names
from natgrad_lab.data.images import Images, Source, Splits, as_they_are
from natgrad_lab.data.opening import Names, open_tables
from natgrad_lab.data.pictures import Bad, Decoder, Pictures
from natgrad_lab.data.subsets import drawn, first_classes, shrunk
from natgrad_lab.data.tables import Table

MEAN, STD = (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)
SIZES = (32, 16, 8, 4)
MEAN_10, STD_10 = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)


@dataclass(frozen=True)
class Cifar(Source):
    """What both have in common; a kind says its number of classes, its scale and its column of labels."""

    path: str = ""
    """A data set of the hub (OWNER/NAME), or a folder with its train-*.parquet and test-*.parquet."""
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
    bad_limit: int = 10
    """Unreadable images that are replaced by the next good one; one more ends the run."""

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
        self._tables()

    def load(self) -> Splits:
        bad = Bad(self.bad_limit)
        train, test = (
            shrunk(first_classes(self._images(table, bad), self.classes()), self.size) for table in self._tables()
        )
        train = train if self.subset is None else drawn(train, self.subset)
        return Splits(train, test, CropFlip(self.size // 8) if self.augment else as_they_are)

    def _tables(self) -> tuple[Table, Table]:
        if class_names(self.path):
            raise ValueError(
                f"{self.path!r} holds class folders of pictures, not CIFAR-{self.kinds}; add --data ImageSet before "
                "--data.path, or name a folder of CIFAR's parquet files"
            )
        try:
            return open_tables(self.path, Names(label=self.column), self.kinds)
        except ValueError as error:
            raise ValueError(
                f"{str(error).split('; ')[0]}; --data.path must name CIFAR-{self.kinds}, the hub's {self.hub}, "
                "or a folder of its parquet files"
            ) from None

    def _images(self, table: Table, bad: Bad) -> Images:
        decoder = Decoder(table, torch.arange(len(table)), 32, patience=self.bad_limit)
        scale = {"mean": self.mean, "std": self.std, "each": self.each_image}
        encoded = Images(Pictures(decoder, bad), table.labels, self.kinds, bad=bad, **scale)
        return encoded.decoded()


@dataclass(frozen=True)
class Cifar100(Cifar):
    """CIFAR-100 with its 100 fine labels, decoded once when loaded."""

    path: str = "uoft-cs/cifar100"
    """A data set of the hub (OWNER/NAME), or a folder with its train-*.parquet and test-*.parquet."""

    hub, column, mean, std = "uoft-cs/cifar100", "fine_label", MEAN, STD
    kinds = 100


@dataclass(frozen=True)
class Cifar10(Cifar):
    """CIFAR-10 with its ten labels, decoded once when loaded."""

    path: str = "uoft-cs/cifar10"
    """A data set of the hub (OWNER/NAME), or a folder with its train-*.parquet and test-*.parquet."""

    hub, column, mean, std = "uoft-cs/cifar10", "label", MEAN_10, STD_10
    kinds = 10
