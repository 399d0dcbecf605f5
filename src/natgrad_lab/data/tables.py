"""A table is one split of a data set as `datasets` holds it: encoded pictures, nothing decoded yet, and labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Table:
    """n encoded pictures and their labels."""

    rows: Any
    """A datasets.Dataset whose only column, `image`, holds {"bytes", "path"}, one of them None."""
    labels: Tensor
    """[n], int64, each at least 0 and below `classes`."""
    classes: int
    split: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def fingerprint(self) -> str | None:
        """What changes with the pictures; None where they are files of their own, which may change by themselves."""
        image = self.rows[0]["image"] if len(self) else {"bytes": None}
        return None if image["bytes"] is None else getattr(self.rows, "_fingerprint", None)

    def encoded(self, places: list[int]) -> list[bytes | str | None]:
        """Return the bytes of these pictures, or the paths of their files."""
        return [image["path"] if image["bytes"] is None else image["bytes"] for image in self.rows[places]["image"]]

    def name(self, place: int) -> str:
        """Return a picture's file, or its row where it has none of its own."""
        return named(self.rows, place, self.split)


def named(rows: Any, place: int, split: str) -> str:
    """Return a row's file, or the row where its picture has no file of its own."""
    image = rows[place]["image"]
    path = image["path"]
    if image["bytes"] is None and path:
        return str(Path(path))
    return f"{split} row {place}" + (f" ({path})" if path else "")


def table(rows: Any, column: Any, classes: int | None, split: str) -> Table:
    """Make a table of pictures and a column of labels, a pyarrow array; ValueError names the first wrong label.

    Without `classes`, they are counted: the largest label and one.
    """
    values = column.to_numpy(zero_copy_only=False)
    numbers = np.asarray(values, dtype=np.float64)  # a missing label becomes NaN
    known = int(np.nanmax(numbers, initial=-1)) + 1 if classes is None else classes
    wrong = np.flatnonzero(~((numbers >= 0) & (numbers < known)))
    if len(wrong):
        place, count = int(wrong[0]), len(wrong)
        label = "no label" if np.isnan(numbers[place]) else f"label {int(numbers[place])}"
        more = f", as {count - 1} others" if count > 1 else ""
        raise ValueError(
            f"{named(rows, place, split)} has {label}{more}; labels must be 0 to {known - 1}: mend the data"
        )
    return Table(rows, torch.from_numpy(numbers.astype(np.int64)), known, split)
