"""A command's arguments become a typed value by tyro; whatever is wrong with them becomes one line."""

import contextlib
import difflib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, TypeVar

import tyro

from natgrad_lab.train.part_kinds import offered, swap
from natgrad_lab.train.recipe import Recipe
from natgrad_lab.train.run import Options

T = TypeVar("T")


@dataclass(frozen=True)
class Training:
    """What `natgrad train` takes: a recipe's fields and the options of its run, side by side."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)


@dataclass(frozen=True)
class Reporting:
    """What `natgrad report` takes."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders of runs or comparisons."""
    out: str | None = None
    """The file to write; None: report.html in the first folder."""


def parse(default: T, prog: str, description: str, arguments: list[str]) -> T:
    """Return `default` with the fields that the arguments name replaced; ValueError says what is wrong."""
    default, arguments = swap(default, arguments)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _wide(not {"-h", "--help"} & set(arguments)):
            value, unknown = tyro.cli(
                type(default),
                default=default,
                prog=prog,
                description=f"{description}\n\n{offered(default)}".strip(),
                args=arguments,
                return_unknown_args=True,
            )
    except SystemExit as leaving:
        if not leaving.code:
            raise
        raise ValueError(f"{_first_sentence(said.getvalue())}; see {prog} --help") from None
    if unknown:
        raise ValueError(_unknown(unknown[0], default, prog))
    return value


def _unknown(argument: str, default: Any, prog: str) -> str:
    known = ["--" + name.replace("_", "-") for name in names(default)]
    word = argument.split("=")[0].replace("_", "-")
    near = [name for name in known if name.rpartition(".")[2] == word.lstrip("-")]  # --lr is --optimizer.lr
    near = near or difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"see {prog} --help"
    return f"there is no field {argument!r}; {hint}"


def names(value: Any, prefix: str = "") -> list[str]:
    """Return the dotted names of all fields of nested dataclasses, as the command line knows them."""
    found = []
    for entry in fields(value):
        inner = getattr(value, entry.name)
        flat = any(getattr(mark, "name", None) == "" for mark in getattr(entry.type, "__metadata__", ()))
        name = prefix if flat else f"{prefix}{entry.name}"
        if is_dataclass(inner):
            found += names(inner, "" if flat else f"{name}.")
        else:
            found.append(name)
    return found


def _first_sentence(box: str) -> str:
    """Return what tyro says in the first part of its box, as one line without the frame."""
    lines = [line.strip(" │") for line in box.splitlines()[1:]]
    first = [line for line in lines[: next((i for i, line in enumerate(lines) if set(line) <= {"─"}), None)] if line]
    return " ".join(first).rstrip(".").removeprefix("Error parsing ")


@contextlib.contextmanager
def _wide(on: bool) -> Iterator[None]:
    """Keep tyro from breaking the lines of its errors where the terminal ends."""
    before = os.environ.get("COLUMNS")
    if on:
        os.environ["COLUMNS"] = "1000"
    try:
        yield
    finally:
        if before is not None:
            os.environ["COLUMNS"] = before
        elif on:
            del os.environ["COLUMNS"]
