"""A checkpoint on disk: what each rank wrote, found again by torch.distributed.checkpoint, whole or not at all.

    step-00000120/            renamed from step-00000120.part when every rank is done: where it is there, it is whole
        .metadata             which tensor lies in which file: torch.distributed.checkpoint reads the folder as one
        state.json            what is no tensor, and the digests of .metadata and of every sums.json
        rank-0/__0_0.distcp   tensors, as rank 0 wrote them
        rank-0/sums.json      digests of the rank's files

Ranks write without talking to each other, each a checkpoint of its own in the background; rank 0 joins their tables of
contents afterwards. Nothing that is read runs code: tensors are loaded by weights_only, the table of contents by an
unpickler that knows a dozen names, everything else is JSON.
"""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import math
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

FORMAT = 2
SEALED = r"\.metadata|rank-\d+/sums\.json"
"""The files of which state.json has digests."""
READS = (1, 2)
"""Format 1 has squares of symmetric matrices, where 2 has them packed (triangles.py); they are packed when loaded."""
ALONE: dict[str, Any] = {"no_dist": True}  # every rank for itself

KNOWN = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}


class DamagedError(ValueError):
    """A checkpoint that cannot be what was written."""


def check() -> None:
    """Raise a ValueError where this torch cannot save without talking to other ranks."""
    if "no_dist" not in inspect.signature(dcp.save).parameters:
        raise ValueError(f"torch {torch.__version__} is too old for checkpoints; use 2.8 or newer, or --save-every 0")


def name_of(step: int) -> str:
    """The folder of the checkpoint after so many steps."""
    return f"step-{step:08d}"


def found(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a folder, rising."""
    names = (re.fullmatch(r"step-(\d{8,})", entry.name) for entry in folder.glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def write_part(folder: Path, rank: int, tensors: Mapping[str, Tensor]) -> None:
    """Write a rank's tensors and their digests to `folder`/rank-RANK, down to the disk."""
    own = folder / f"rank-{rank}"
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it saves alone, which is what is meant
        dcp.save(dict(tensors), storage_writer=Writer(own), planner=planner, **ALONE)
    sums = {entry.name: digest(entry) for entry in sorted(own.iterdir())}
    write_safely(own / "sums.json", json.dumps(sums, indent=1))
    sync_folder(own)


class Writer(dcp.FileSystemWriter):
    """Writes a table of contents that names no path, so that a folder can be moved."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


def commit(part: Path, ranks: int, values: Mapping[str, Any]) -> Path:
    """Make one checkpoint of what all ranks have written to `part`, and return where it is."""
    tables = {rank: read_table(part / f"rank-{rank}") for rank in range(ranks)}
    table = joined(tables)
    places = [WriteResult(index, 0, place) for index, place in (table.storage_data or {}).items()]
    Writer(part).finish(table, [places])  # writes .metadata
    sealed = [".metadata", *(f"rank-{rank}/sums.json" for rank in range(ranks))]
    content = {"format": FORMAT, **values, "sums": {name: digest(part / name) for name in sealed}}
    write_safely(part / "state.json", json.dumps({"content": content, "digest": digest_of(content)}, indent=1))
    sync_folder(part)
    whole = part.with_suffix("")
    if whole.exists():
        set_aside(whole)
    part.rename(whole)
    sync_folder(whole.parent)
    return whole


def joined(tables: Mapping[int, Metadata]) -> Metadata:
    """One table of contents of all ranks' tensors, each under its folder. Of tensors that are cut over ranks each table
    has a part.
    """
    contents: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for rank, table in tables.items():
        for name, entry in table.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata) and name in contents:
                entry = replace(entry, chunks=[*contents[name].chunks, *entry.chunks])
            contents[name] = entry
        for index, place in table.storage_data.items():
            places[index] = replace(place, relative_path=f"rank-{rank}/{place.relative_path}")
    return replace(tables[0], state_dict_metadata=contents, storage_data=places)


def set_aside(checkpoint: Path) -> None:
    """Keep a checkpoint under a name that is not found any more: its run has gone another way since."""
    other = checkpoint.with_name(checkpoint.name + ".set-aside")
    shutil.rmtree(other, ignore_errors=True)
    checkpoint.rename(other)


def read_values(checkpoint: Path) -> dict[str, Any]:
    """What is no tensor; DamagedError where the file is not as it was written."""
    try:
        told = json.loads((checkpoint / "state.json").read_text())
        content, known = dict(told["content"]), told["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DamagedError(f"{str(checkpoint)!r} is no checkpoint of natgrad: its state.json cannot be read") from None
    if digest_of(content) != known:
        raise DamagedError(f"checkpoint {str(checkpoint)!r} is damaged: state.json is not as it was written")
    if content.get("format") not in READS:
        raise DamagedError(
            f"checkpoint {str(checkpoint)!r} has format {content.get('format')!r}, this natgrad reads {READS}: go on "
            "with the version that wrote it, or --overwrite begins anew"
        )
    wrong = [name for name, fits in FITS.items() if not (name in content and fits(content[name]))]
    if wrong:
        raise DamagedError(f"checkpoint {str(checkpoint)!r} has no {wrong[0]} that can be used in its state.json")
    return content


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


FITS: dict[str, Callable[[Any], bool]] = {
    "ranks": lambda value: _whole(value, 1),
    "steps": lambda value: _whole(value, 1),
    "step": lambda value: _whole(value, 0),
    "elapsed": lambda value: isinstance(value, int | float) and 0 <= value < math.inf,
    "recipe": lambda value: isinstance(value, dict) and isinstance(_kind(value.get("optimizer")), str),
    "groups": lambda value: isinstance(value, dict),
    "scaler": lambda value: value is None or isinstance(value, dict),
    "sums": lambda value: isinstance(value, dict) and all(re.fullmatch(SEALED, name) for name in value),
}
"""What values of a checkpoint must be: a file may have been written to do harm, and its digests with it."""


def _kind(value: Any) -> Any:
    return value.get("kind") if isinstance(value, dict) else None


def verify(checkpoint: Path, rank: int, size: int) -> None:
    """Compare every `size`-th part with its digests, beginning at the rank's own; DamagedError names what differs."""
    sums = read_values(checkpoint)["sums"]
    for name in [".metadata", *sorted(sums)[rank::size]]:
        _compare(checkpoint, name, sums[name])
        if name.endswith("sums.json"):
            own = Path(name).parent
            for file, known in _read_sums(checkpoint, name).items():
                _compare(checkpoint, str(own / file), known)


def _read_sums(checkpoint: Path, name: str) -> dict[str, str]:
    """The digests of one rank's files."""
    try:
        found = json.loads((checkpoint / name).read_text())
        if all(re.fullmatch(r"\.metadata|\w+\.distcp", file) for file in found):
            return dict(found)
    except (OSError, ValueError, TypeError):
        pass
    raise DamagedError(f"checkpoint {str(checkpoint)!r} is damaged: {name} is no list of files in its folder")


def _compare(checkpoint: Path, name: str, known: str) -> None:
    try:
        same = digest(checkpoint / name) == known
    except OSError as error:
        raise DamagedError(f"checkpoint {str(checkpoint)!r} is damaged: {name}: {error.strerror}") from None
    if not same:
        raise DamagedError(f"checkpoint {str(checkpoint)!r} is damaged: {name} is not as it was written")


def contents(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    """Shape (`size`) and type (`properties.dtype`) of every tensor by name."""
    table = read_table(checkpoint).state_dict_metadata
    return {name: entry for name, entry in table.items() if isinstance(entry, TensorStorageMetadata)}


def load(
    checkpoint: Path, names: Mapping[str, TensorStorageMetadata], cut: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of these names, in memory.

    cut: tensors that are cut over ranks, of which this rank reads its part alone.
    """
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if name not in (cut or {})
        else torch.empty_like((cut or {})[name], dtype=entry.properties.dtype)
        for name, entry in names.items()
    }
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    if tensors:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                dcp.load(cast("dict[str, Any]", tensors), storage_reader=Reader(checkpoint), planner=planner, **ALONE)
            except (Exception, CheckpointException) as error:  # torch's is no Exception
                why = " ".join(str(packed(error)).split())[:120]
                raise DamagedError(
                    f"checkpoint {str(checkpoint)!r} is damaged: its tensors cannot be read ({why})"
                ) from error
    return tensors


def packed(error: BaseException) -> BaseException:
    """The error of a rank that torch has packed into one of its own."""
    for inner, _ in getattr(error, "failures", {}).values():
        return packed(inner)
    return error


class Reader(dcp.FileSystemReader):
    """Reads a table of contents without running what it may name."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_table(Path(self.path))


def read_table(folder: Path) -> Metadata:
    """A folder's table of contents."""
    with (folder / ".metadata").open("rb") as stream:
        try:
            table = Plain(stream).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"checkpoint {str(folder)!r} is damaged: .metadata cannot be read ({error})") from None
    if not isinstance(table, Metadata):
        raise DamagedError(f"checkpoint {str(folder)!r} is damaged: .metadata is no table of contents")
    try:
        _check_table(folder, table)
    except (AttributeError, TypeError, ValueError, OSError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(f"checkpoint {str(folder)!r} is damaged: .metadata cannot be used ({error})") from None
    return table


def _check_table(folder: Path, table: Metadata) -> None:
    """Refuse files outside of the folder, and tensors larger than its files: they were never written."""
    places = (table.storage_data or {}).values()
    for place in places:
        if not re.fullmatch(r"(rank-\d+/)?\w+\.distcp", place.relative_path):
            raise DamagedError(f"checkpoint {str(folder)!r} names a file outside of it: {place.relative_path!r}")
    files = {place.relative_path for place in places}
    room = sum((folder / file).stat().st_size for file in files if (folder / file).exists())
    for name, entry in table.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            wanted = math.prod(entry.size) * entry.properties.dtype.itemsize
            if wanted > room or min(entry.size, default=0) < 0:
                raise DamagedError(
                    f"checkpoint {str(folder)!r} is damaged: {name} of shape {tuple(entry.size)} would be {wanted:,} "
                    f"bytes, its files have {room:,}"
                )


class Plain(pickle.Unpickler):
    """Makes tables of contents and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no table of contents has")


def digest(file: Path) -> str:
    """SHA-256 of a plain file: a pipe, a device or a link has no end, or is not the checkpoint's."""
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise OSError(errno.EINVAL, "it is no plain file", str(file))
    total = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def digest_of(content: Any) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_safely(file: Path, text: str) -> None:
    """Write a file down to the disk."""
    with file.open("w") as stream:
        stream.write(text)
        flush(stream)


def flush(stream: Any) -> None:
    """Wait until a file is on the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
