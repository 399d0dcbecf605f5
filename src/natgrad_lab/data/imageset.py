"""Any images with labels, brought to one size: class folders, parquet files, or a data set of the hub."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from natgrad_lab.data.augment import Crop, Zoom, crop_and_flip, flip
from natgrad_lab.data.decoding import Resize
from natgrad_lab.data.folders import class_names
from natgrad_lab.data.images import Augment, Cut, Images, Source, Splits, as_they_are, read_ahead, whole
from natgrad_lab.data.opening import DEFAULT, Names, kind, open_tables
from natgrad_lab.data.pictures import Bad, Decoder, Pictures
from natgrad_lab.data.prefetch import cores
from natgrad_lab.data.tables import Table

MEAN, STD = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)  # ImageNet's, in raw units
AVERAGED = 4096
"""Images that make the mean image: its error is then below 0.005 of the range of pixels."""


@dataclass(frozen=True)
class ImageSet(Source):
    """Images of any shapes: those to learn from, and those to be judged by."""

    path: str = "data/images"
    """Folder with train/CLASS/ and val/CLASS/, folder of parquet files, or a data set of the hub (OWNER/NAME)."""
    size: int = 64
    """Height and width to which every image is brought when it is decoded."""
    resize: Resize = "squash"
    """All of each image, whatever its shape; or cut: its short side to `size`, then the middle square."""
    crop: int | None = None
    """Height and width of what the network sees: cut at random from images for learning, else the middle; None: all."""
    zoom: tuple[float, float] | None = None
    """Least and largest share of an image that `crop` is made of while learning, by interpolation; None: no zoom."""
    subtract: Literal["channels", "image"] = "channels"
    """ImageNet's mean of each channel, over its deviation; or the training images' mean image, over 255 (SP-NGD)."""
    augment: bool = True
    """Mirror half of the images, cut at random or (without `crop`) shift by up to four pixels, anew for every batch."""
    in_memory: bool = True
    """Decode all images once; otherwise each is decoded whenever a batch has it, ahead of time, by `workers`."""
    workers: int | None = None
    """Processes of each rank that decode; 0: none, each batch when it is asked for; None: its part of the cores."""
    bad_limit: int = 10
    """Unreadable images that are replaced by the next good one; one more ends the run."""
    names: Names = DEFAULT
    """Splits and columns, where that does not go without saying."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size} must be positive; it is the images' height and width in pixels")
        if self.crop is not None and not 1 <= self.crop <= self.size:
            raise ValueError(f"crop={self.crop} must be between 1 and size={self.size}; set --data.crop")
        if self.zoom is not None and not (self.augment and self.crop and 0 < self.zoom[0] <= self.zoom[1] <= 1):
            raise ValueError(f"zoom={self.zoom} must rise between 0 and 1, beside crop and augment; set --data.crop")
        for name in ("workers", "bad_limit"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(
                    f"{name}={getattr(self, name)} must not be negative; set --data.{name.replace('_', '-')}"
                )

    def shape(self) -> tuple[int, int, int]:
        return (3, self.seen, self.seen)

    @property
    def seen(self) -> int:
        """Height and width of the inputs."""
        return self.size if self.crop is None else self.crop

    def classes(self) -> int:
        if kind(self.path) == "folders":
            return len(class_names(self.path))
        return self._tables()[0].classes

    def check(self) -> None:
        self._tables()

    def load(self) -> Splits:
        tables, bad = self._tables(), Bad(self.bad_limit)
        train, test = (self._images(table, bad, learning) for table, learning in zip(tables, (True, False)))
        if self.subtract == "image":
            mean = mean_image(train, self.seen)
            train, test = (replace(images, mean=mean, std=(255.0, 255.0, 255.0)) for images in (train, test))
        return Splits(train, test, self._augment())

    def _tables(self) -> tuple[Table, Table]:
        return open_tables(self.path, self.names)

    def _augment(self) -> Augment:
        if not self.augment:
            return as_they_are
        return crop_and_flip if self.crop is None else flip

    def _images(self, table: Table, bad: Bad, learning: bool) -> Images:
        decoder = Decoder(table, torch.arange(len(table)), self.size, self.resize, self.bad_limit)
        pictures = Pictures(decoder, bad, cores() if self.workers is None else self.workers)
        images = Images(pictures, table.labels, table.classes, MEAN, STD, self._cut(learning), bad=bad)
        return images.decoded() if self.in_memory else images

    def _cut(self, learning: bool) -> Cut:
        if self.crop is None:
            return whole
        if learning and self.zoom is not None:
            return Zoom(self.crop, self.zoom)
        return Crop(self.crop, random=self.augment and learning)


def mean_image(images: Images, size: int) -> Tensor:
    """The upper left `size` x `size` of the mean of some 4,096 images, evenly spaced: [3, size, size]."""
    places = torch.linspace(0, len(images) - 1, min(AVERAGED, len(images))).long()
    indices: Iterable[Tensor] = places.split(256)
    total = torch.zeros((), dtype=torch.float64)
    reading = read_ahead(images, indices)
    for index in indices:
        total = total + reading.raw(index)[0].sum(0, dtype=torch.float64)
    return (total / len(places))[:, :size, :size].float()
