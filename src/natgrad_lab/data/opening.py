"""What `--data.path` may name, all of it read through `datasets`:

PATH/train/CLASS/*.jpg, PATH/val/CLASS/*.jpg     class folders, as ImageNet's (folders.py)
PATH/train-*.parquet, PATH/test-*.parquet        parquet files, in any layout that `load_dataset` knows
OWNER/NAME                                       a data set of the Hugging Face hub, downloaded once
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from natgrad_lab.data.folders import class_folders, class_names
from natgrad_lab.data.tables import Table, table

JUDGED = ("validation", "valid", "val", "test")
"""Splits to be judged by, the first that there is: of many sets the test's labels are not public."""


@dataclass(frozen=True)
class Names:
    """What splits, columns and configuration of a set are called, where that does not go without saying."""

    train: str = "train"
    """Split to learn from."""
    test: str | None = None
    """Split to be judged by; None: validation, valid, val or test, the first that there is."""
    image: str | None = None
    """Column of pictures; None: the only one of datasets' type Image."""
    label: str | None = None
    """Column of labels; None: the only ClassLabel, or where there is none, the only whole numbers."""
    config: str | None = None
    """The hub's name for a part or version of the set; None: its default."""


def kind(path: str) -> str:
    """Say what a path names, "folders", "parquet" or "hub", without asking the hub; ValueError for none of them."""
    folder = Path(path)
    if class_names(path):
        return "folders"
    if folder.is_dir() and next(folder.rglob("*.parquet"), None) is not None:
        return "parquet"
    if folder.exists() or folder.parent.is_dir() or not re.fullmatch(r"(?!data/)\w[\w.-]*/\w[\w.-]*", path):
        what = "has neither class folders nor parquet files" if folder.exists() else "is not there"
        raise ValueError(f"{path!r} {what}; {WAY_OUT}")
    return "hub"


WAY_OUT = (
    "--data.path must name a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, one of parquet files, "
    "or a data set of the hub (OWNER/NAME)"
)


DEFAULT = Names()


def open_tables(path: str, names: Names = DEFAULT, classes: int | None = None) -> tuple[Table, Table]:
    """Return the tables to learn from and to be judged by; ValueError says in one line what is not as it should be.

    What the hub has is downloaded at the first call. The number of classes is what the column of labels says, else one
    more than the largest label to learn from, where it is not given.
    """
    found = kind(path)
    if found == "folders":
        return class_folders(path)
    splits = _load(path, names.config, found)
    test = names.test or next((name for name in JUDGED if name in splits), "test")
    for option, name in (("train", names.train), ("test", test)):
        if name not in splits:
            raise ValueError(f"{path!r} has no split {name!r} but {', '.join(splits)}; set --data.names.{option}")
    features = splits[names.train].features
    image, label = image_column(path, features, names.image), label_column(path, features, names.label)
    train = _table(path, splits[names.train], image, label, names.train, classes)
    return train, _table(path, splits[test], image, label, test, train.classes)


def _load(path: str, config: str | None, found: str) -> Any:
    """Open local parquet files or a data set of the hub as {split: rows}."""
    import datasets

    if found == "parquet":
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, config)
    except Exception as error:  # the hub, its cache and the files each have their own
        said = " ".join(str(error.__cause__ or error).split())[:200]
        if found == "parquet":
            raise ValueError(f"the parquet files in {path!r} cannot be read: {said}") from None
        raise ValueError(
            f"{path!r} is no folder here, and the hub does not give it: {said}; "
            f"download it where there is a network, or {WAY_OUT}"
        ) from None


def image_column(path: str, features: Any, asked: str | None) -> str:
    """Find the column of pictures by its type: datasets' Image, or bytes beside a path as it stores them."""
    from datasets import Image

    found = [name for name, kind in features.items() if isinstance(kind, Image)]
    found = found or [name for name, kind in features.items() if isinstance(kind, dict) and "bytes" in kind]
    return _chosen(path, "image", asked, found, list(features))


def label_column(path: str, features: Any, asked: str | None) -> str:
    """Find the column of labels by its type: ClassLabel, or where there is none, whole numbers."""
    from datasets import ClassLabel

    found = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    whole = [name for name, kind in features.items() if "int" in getattr(kind, "dtype", "")]
    if asked in features and asked not in whole:
        raise ValueError(
            f"column {asked!r} of {path!r} holds no whole numbers, which labels must be: {features[asked]}"
        )
    return _chosen(path, "label", asked, found or whole, list(features))


def _chosen(path: str, what: str, asked: str | None, found: list[str], there: list[str]) -> str:
    """Return the column that was asked for, else the only one of its type."""
    if asked in there:
        return asked
    if asked is not None:
        raise ValueError(f"{path!r} has no column {asked!r} but {', '.join(there)}; set --data.names.{what}")
    if len(found) == 1:
        return found[0]
    which = (
        f"several columns of {what}s, {', '.join(found)}" if found else f"no column of {what}s among {', '.join(there)}"
    )
    raise ValueError(
        f"{path!r} has {which}; " + (f"name one by --data.names.{what}" if found else "it cannot be learned from")
    )


def _table(path: str, rows: Any, image: str, label: str, split: str, classes: int | None = None) -> Table:
    from datasets import ClassLabel, Image

    for name in (image, label):
        if name not in rows.column_names:
            raise ValueError(f"split {split!r} of {path!r} has no column {name!r} but {', '.join(rows.column_names)}")
    if classes is None and isinstance(rows.features[label], ClassLabel):
        classes = rows.features[label].num_classes
    pictures = rows.select_columns([image]).rename_column(image, "image").cast_column("image", Image(decode=False))
    return table(pictures, rows.data.column(label), classes, split)
