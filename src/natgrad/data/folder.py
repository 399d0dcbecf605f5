"""Any images in class folders: PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg, brought to one size."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from natgrad.data.augment import Crop, Zoom, crop_and_flip, flip
from natgrad.data.images import Augment, Cut, Images, Source, Splits, as_they_are, whole
from natgrad.data.pictures import Pictures, read

ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
MEAN, STD = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)  # ImageNet's, in raw units
AVERAGED = 4096
"""Images that make the mean image: its error is then below 0.005 of the range of pixels."""


@dataclass(frozen=True)
class ImageFolder(Source):
    """A folder with `train` and `val`, each with one folder of images per class."""

    path: str = "data/images"
    """Folder with train/CLASS/ and val/CLASS/."""
    size: int = 64
    """Height and width to which every image is resized when it is read, whatever its shape was."""
    crop: int | None = None
    """Height and width of what the network sees: cut at random from images for learning, else the middle; None: all."""
    zoom: tuple[float, float] | None = None
    """Least and largest share of an image that `crop` is made of while learning, by interpolation; None: no zoom."""
    subtract: Literal["channels", "image"] = "channels"
    """ImageNet's mean of each channel, over its deviation; or the training images' mean image, over 255 (SP-NGD)."""
    augment: bool = True
    """Mirror half of the images, cut at random or (without `crop`) shift by up to four pixels, anew for every batch."""
    in_memory: bool = True
    """Read all images once; otherwise each is decoded from its file whenever a batch has it."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size} must be positive; it is the images' height and width in pixels")
        if self.crop is not None and not 1 <= self.crop <= self.size:
            raise ValueError(f"crop={self.crop} must be between 1 and size={self.size}; set --data.crop")
        if self.zoom is not None and not (self.augment and self.crop and 0 < self.zoom[0] <= self.zoom[1] <= 1):
            raise ValueError(f"zoom={self.zoom} must rise between 0 and 1, beside crop and augment; set --data.crop")

    def shape(self) -> tuple[int, int, int]:
        return (3, self.seen, self.seen)

    @property
    def seen(self) -> int:
        """Height and width of the inputs."""
        return self.size if self.crop is None else self.crop

    def classes(self) -> int:
        names = self._classes()
        if not names:
            raise ValueError(
                f"no train/CLASS folders in {self.path!r}; --data.path must name a folder with "
                "train/CLASS/*.jpg and val/CLASS/*.jpg"
            )
        return len(names)

    def check(self) -> None:
        self.classes()
        for split in ("train", "val"):
            if next(self._files(split), None) is None:
                raise ValueError(f"no images in {self.path!r}/{split}; expected {split}/CLASS/*.jpg, png, bmp or webp")

    def load(self) -> Splits:
        self.check()
        train, test = self._read("train"), self._read("val")
        if self.subtract == "image":
            mean = mean_image(train, self.seen)
            train, test = (replace(images, mean=mean, std=(255.0, 255.0, 255.0)) for images in (train, test))
        return Splits(train, test, self._augment())

    def _augment(self) -> Augment:
        if not self.augment:
            return as_they_are
        return crop_and_flip if self.crop is None else flip

    def _classes(self) -> list[str]:
        folder = Path(self.path, "train")
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []

    def _files(self, split: str) -> Iterator[tuple[Path, int]]:
        for label, name in enumerate(self._classes()):
            for file in sorted(Path(self.path, split, name).rglob("*")):
                if file.suffix.lower() in ENDINGS:
                    yield file, label

    def _read(self, split: str) -> Images:
        labelled = list(self._files(split))
        files = [file for file, _ in labelled]
        images = read(files, self.size) if self.in_memory else Pictures(files, self.size)
        labels = torch.tensor([label for _, label in labelled])
        return Images(images, labels, classes=self.classes(), mean=MEAN, std=STD, cut=self._cut(split == "train"))

    def _cut(self, learning: bool) -> Cut:
        if self.crop is None:
            return whole
        if learning and self.zoom is not None:
            return Zoom(self.crop, self.zoom)
        return Crop(self.crop, random=self.augment and learning)


def mean_image(images: Images, size: int) -> Tensor:
    """The upper left `size` x `size` of the mean of some 4,096 images, evenly spaced: [3, size, size]."""
    places = torch.linspace(0, len(images) - 1, min(AVERAGED, len(images))).long()
    total = torch.zeros((), dtype=torch.float64)
    for index in places.split(256):
        total = total + images.images[index].sum(0, dtype=torch.float64)
    return (total / len(places))[:, :size, :size].float()
