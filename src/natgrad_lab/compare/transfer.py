"""Settings taken over: what another comparison has chosen at one of its sizes of batch, used here without tuning."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from natgrad_lab.compare.contenders import Contender

Batch = int | Literal["full"]


class Stated(NamedTuple):
    """Settings that stand in the code, by contender, and the comparison that has chosen them, in words."""

    chosen: Mapping[str, Mapping[str, Any]]
    by: str

    def values(self, contender: Contender, batch: Batch) -> list[dict[str, Any]]:
        """Return what is stated for a contender. Raise ValueError where nothing is."""
        if contender.name not in self.chosen:
            raise ValueError(
                f"this profile states no settings of {contender.name}; leave it out of --optimizers, or set --trials"
            )
        return [dict(self.chosen[contender.name])]

    def words(self, batch: Batch) -> str:
        """Say where the settings come from."""
        return self.by


class Transfer(NamedTuple):
    """A finished comparison, and the size of batch whose settings are taken."""

    folder: Path
    batch: Batch | None = None
    """None: the size of batch that is to be run, or the only one of that comparison."""

    def values(self, contender: Contender, batch: Batch) -> list[dict[str, Any]]:
        """Return what was chosen for a contender: for all steps, and for half of them where that was tuned for.

        Raises ValueError where the comparison is not finished, or chose nothing that fits.
        """
        cells = [one for one in self._results()["cells"] if one["contender"] == contender.name]
        if not cells:
            raise ValueError(f"{self._named()} has no {contender.name}; leave it out of --optimizers")
        budgets = sorted(self._cell(cells, batch)["budgets"], key=lambda one: -one["steps"])
        found = [{name: _plain(value) for name, value in one["values"].items()} for one in budgets]
        if set(found[0]) != set(contender.all_of()):
            there, here = ", ".join(found[0]), ", ".join(contender.all_of())
            raise ValueError(f"{self._named()} chose {there} for {contender.name}, whose space is now {here}")
        return found

    def words(self, batch: Batch) -> str:
        """Say where the settings for a size of batch come from."""
        results = self._results()
        sizes = list(dict.fromkeys(one["batch"] for one in results["cells"]))
        return f"{results['plan']['task']['name']} at batch {self._size(sizes, batch)}"

    def _cell(self, cells: list[Any], batch: Batch) -> Any:
        size = self._size([one["batch"] for one in cells], batch)
        return next(one for one in cells if one["batch"] == size)

    def _size(self, sizes: list[Batch], batch: Batch) -> Batch:
        wanted = batch if self.batch is None else self.batch
        if wanted in sizes:
            return wanted
        if self.batch is None and len(sizes) == 1:
            return sizes[0]
        listed = ", ".join(map(str, sizes))
        raise ValueError(f"{self._named()} has no batch {wanted}; set --settings-batch to one of {listed}")

    def _results(self) -> Any:
        path = self.folder / "results.json"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            raise ValueError(
                f"{self._named()} holds no finished comparison; name a folder with its results.json"
            ) from None

    def _named(self) -> str:
        return f"--settings {str(self.folder)!r}"


def _plain(value: Any) -> Any:
    """Return a value as the spaces have it: JSON turns tuples into lists."""
    return tuple(map(_plain, value)) if isinstance(value, list) else value
