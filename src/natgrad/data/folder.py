"""Any images in class folders: PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg, read once to one size."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from natgrad.data.augment import crop_and_flip
from natgrad.data.images import Images, Source, Splits, as_they_are

ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
MEAN, STD = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)  # ImageNet's, in raw units


@dataclass(frozen=True)
class ImageFolder(Source):
    """A folder with `train` and `val`, each with one folder of images per class."""

    path: str = "data/images"
    """Folder with train/CLASS/ and val/CLASS/."""
    size: int = 64
    """Height and width to which every image is resized when it is read."""
    augment: bool = True
    """Shift by up to four pixels and mirror, drawn anew for every batch."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size} must be positive; it is the images' height and width in pixels")

    def shape(self) -> tuple[int, int, int]:
        return (3, self.size, self.size)

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
            if not self._files(split):
                raise ValueError(f"no images in {self.path!r}/{split}; expected {split}/CLASS/*.jpg, png, bmp or webp")

    def load(self) -> Splits:
        self.check()
        augment = crop_and_flip if self.augment else as_they_are
        return Splits(self._read("train"), self._read("val"), augment)

    def _classes(self) -> list[str]:
        folder = Path(self.path, "train")
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []

    def _files(self, split: str) -> list[tuple[Path, int]]:
        return [
            (file, label)
            for label, name in enumerate(self._classes())
            for file in sorted(Path(self.path, split, name).rglob("*"))
            if file.suffix.lower() in ENDINGS
        ]

    def _read(self, split: str) -> Images:
        files = self._files(split)
        images = np.stack([_picture(file, self.size) for file, _ in files])
        labels = torch.tensor([label for _, label in files])
        return Images(torch.from_numpy(images), labels, classes=self.classes(), mean=MEAN, std=STD)


def _picture(file: Path, size: int) -> np.ndarray:
    """Return a file as uint8 [3, size, size], whatever its shape was."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as picture:
            small = picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{str(file)!r} is no readable image ({error}); remove it") from None
    return np.asarray(small, dtype=np.uint8).transpose(2, 0, 1)
