"""Pictures in class folders, as ImageNet's: PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg.

The folders are listed here rather than by `load_dataset("imagefolder")`, which takes half a millisecond a file on every
rank at every start (eleven minutes of ImageNet) and takes a class that only `val` has for one more class.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from natgrad_lab.data.tables import Table, table

ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
JUDGED = ("val", "validation", "valid", "test")


def class_names(path: str | Path, split: str = "train") -> list[str]:
    """Return the names of a split's class folders in their order, which is that of the labels; hidden ones aside."""
    folder = Path(path, split)
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def class_folders(path: str) -> tuple[Table, Table]:
    """Return the tables to learn from and to be judged by; ValueError names a folder that is not as it should be."""
    classes = class_names(path)
    split = next((name for name in JUDGED if Path(path, name).is_dir()), "val")
    unknown = sorted(set(class_names(path, split)) - set(classes))
    if unknown:
        raise ValueError(f"{str(Path(path, split, unknown[0]))!r} is a class that {path!r}/train does not have")
    train, judged = _table(path, "train", classes), _table(path, split, classes)
    missing = set(range(len(classes))) - set(train.labels.tolist())
    if missing:
        name = str(Path(path, "train", classes[min(missing)]))
        raise ValueError(f"{name!r} has no images; a class without any must be removed")
    return train, judged


def _table(path: str, split: str, classes: list[str]) -> Table:
    import pyarrow
    from datasets import Dataset, Image

    found = [(file, label) for label, name in enumerate(classes) for file in files(Path(path, split, name))]
    if not found:
        raise ValueError(f"no images in {path!r}/{split}; expected {split}/CLASS/*{' *'.join(sorted(ENDINGS))}")
    rows = Dataset(pyarrow.table({"image": pyarrow.array([file for file, _ in found], pyarrow.large_string())}))
    rows = rows.cast_column("image", Image(decode=False))
    return table(rows, pyarrow.array([label for _, label in found]), len(classes), split)


def files(folder: Path) -> Iterator[str]:
    """Yield the images in and below a folder by their endings, in order; links to folders are followed once."""
    seen = set()
    for place, below, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below.sort()
        yield from (os.path.join(place, name) for name in sorted(names) if Path(name).suffix.lower() in ENDINGS)
