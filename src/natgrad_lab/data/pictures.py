"""Pictures that stay encoded and are decoded when a batch asks for them: ImageNet at 256x256 is 252 GB raw.

What a batch holds depends on its index alone; that it may have been read ahead (ahead.py) changes nothing.

A picture that cannot be decoded is noted, and the next good one of the set stands in for it, with its own label: the
same on every rank and in every run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from natgrad_lab.data import decoded_cache
from natgrad_lab.data.decoding import Resize, UnreadableError, picture
from natgrad_lab.data.prefetch import PIECE, Prefetcher
from natgrad_lab.data.tables import Table
from natgrad_lab.progress import tracked

CPU = torch.device("cpu")

ENOUGH = 1024
"""Pictures decoded in the time that the first worker takes to start: some seconds."""


class Read(NamedTuple):
    """Decoded pictures, and which they are."""

    pixels: Tensor
    """[n, 3, size, size], uint8."""
    places: Tensor
    """[n], int64: those asked for, save where another stands in; -1 where no good one was near."""
    bad: dict[str, str]
    """Why pictures could not be decoded, by their names."""


@dataclass(frozen=True)
class Bad:
    """Pictures of a data set that could not be decoded, and how many of them are borne."""

    limit: int = 10
    found: dict[str, str] = field(default_factory=dict)

    def note(self, more: dict[str, str], hopeless: bool = False) -> None:
        """Remember these; raise ValueError where there are too many by now, or nothing stands in for one."""
        self.found.update(more)
        if hopeless or len(self.found) > self.limit:
            raise ValueError(
                f"{len(self.found)} images cannot be read (bad_limit={self.limit}): {'; '.join(self.names()[:3])}"
                f"{', ...' if len(self.found) > 3 else ''}: mend or remove them, or raise --data.bad-limit"
            )

    def names(self) -> list[str]:
        """Return each with the reason, in order."""
        return [f"{name} ({why})" for name, why in sorted(self.found.items())]


@dataclass(frozen=True)
class Decoder(Dataset):
    """Decodes some pictures of a table to one size; a copy of it is in every worker."""

    table: Table
    places: Tensor
    """[n], which pictures of the table."""
    size: int
    resize: Resize = "squash"
    patience: int = 10
    """Bad pictures one after the other, after which nothing more is tried."""

    def __len__(self) -> int:
        return len(self.places)

    def __getitems__(self, places: list[int]) -> Read:
        """Decode the pictures at these places; torch's workers call it so."""
        rows = self.places[places].tolist()
        pixels = np.zeros((len(places), 3, self.size, self.size), dtype=np.uint8)
        used, bad = list(places), dict[str, str]()
        for number, encoded in enumerate(self.table.encoded(rows)):
            found = self._try(encoded, rows[number], bad)
            step = 0
            while found is None and step < min(self.patience, len(self) - 1):
                step += 1
                used[number] = (places[number] + step) % len(self)
                row = int(self.places[used[number]])
                found = self._try(self.table.encoded([row])[0], row, bad)
            if found is None:
                used[number] = -1
            else:
                pixels[number] = found
        return Read(torch.from_numpy(pixels), torch.tensor(used, dtype=torch.int64), bad)

    def _try(self, encoded: bytes | str | None, row: int, bad: dict[str, str]) -> np.ndarray | None:
        try:
            return picture(encoded, self.size, self.resize)
        except UnreadableError as error:
            bad[self.table.name(row)] = str(error)
            return None


@dataclass(frozen=True)
class Pictures:
    """n encoded pictures that an index decodes to a tensor [n, 3, size, size] of uint8."""

    decoder: Decoder
    bad: Bad
    workers: int = 0
    """Processes that read ahead; 0: what is asked for is decoded here and then."""
    device: torch.device = CPU
    coming: Prefetcher | None = None

    def __len__(self) -> int:
        return len(self.decoder)

    def to(self, device: torch.device) -> Pictures:
        """The same pictures, handed out on another device."""
        return replace(self, device=device, coming=None)

    def take(self, index: Tensor) -> Pictures:
        """The pictures at these places."""
        places = self.decoder.places[index.cpu()]
        return replace(self, decoder=replace(self.decoder, places=places), coming=None)

    def ahead(self, indices: Iterable[Tensor]) -> Pictures:
        """The same pictures, of which workers begin to decode these, in this order, before they are asked for."""
        if not self.workers:
            return self
        return replace(self, coming=Prefetcher(self.decoder, indices, self.workers, pin=self.device.type == "cuda"))

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Decode the pictures at an index; return pixels, and the places of those that they are."""
        index = index.cpu()
        pieces = self.coming.read(index) if self.coming is not None else None
        if pieces is None:
            pieces = [self.decoder.__getitems__(piece.tolist()) for piece in index.split(PIECE)]
        for piece in pieces:
            self.bad.note(piece.bad, hopeless=bool((piece.places < 0).any()))
        pixels = pieces[0].pixels if len(pieces) == 1 else torch.cat([piece.pixels for piece in pieces])
        places = torch.cat([piece.places for piece in pieces])
        return pixels.to(self.device, non_blocking=True), places.to(self.device)

    def everything(self) -> tuple[Tensor, Tensor]:
        """Decode all pictures, by workers where they are enough that starting these pays; or read what was decoded."""
        decoder = self.decoder
        file = None
        if decoder.table.fingerprint is not None:
            file = decoded_cache.place_of(decoder.table.fingerprint, decoder.places, decoder.size, decoder.resize)
        found = decoded_cache.kept(file, len(self), decoder.size)
        if found is not None:
            return found.to(self.device), torch.arange(len(self), device=self.device)
        indices = torch.arange(len(self)).split(ENOUGH)
        reading = self.ahead(indices) if len(indices) > 1 else self
        read = [reading.read(index) for index in tracked(indices, len(indices), f"decoding {len(self):,} images")]
        pixels, places = torch.cat([pixels for pixels, _ in read]), torch.cat([places for _, places in read])
        if not self.bad.found:  # else every start says which are bad
            decoded_cache.keep(file, pixels.cpu())
        return pixels, places
