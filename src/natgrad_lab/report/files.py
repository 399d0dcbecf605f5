"""Reads and writes files in folders that a stranger may have made.

What is read is a regular file of bounded size, so nothing waits for a pipe or fills the memory; values are numbers and
texts, so nothing is executed. What is written replaces one file and follows no link.
"""

import json
import math
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

JSON_BYTES = 32 * 2**20
"""The longest JSON file that is read."""
DEPTH = 40
"""How deep lists and dictionaries may lie within one another."""
LINES_BYTES = 4 * 2**30
"""The longest file of lines that is read."""
LINE_BYTES = 2**20
"""The longest line that is read; a longer one counts as broken."""
LARGEST = 1e100
"""Numbers beyond this are taken for none: no axis can show them."""


def open_file(path: Path, most: int) -> BinaryIO:
    """Open a regular file of at most `most` bytes.

    Raises FileNotFoundError where there is none, ValueError (one line that names the file) where it is not to be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read ({getattr(error, 'strerror', error)})") from None
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_size > most:
        os.close(handle)
        what = f"has {found.st_size:,} bytes, more than {most:,}" if stat.S_ISREG(found.st_mode) else "is no file"
        raise ValueError(f"{str(path)!r} {what}; natgrad report reads what natgrad has written")
    return os.fdopen(handle, "rb")


def read_json(path: Path, most: int = JSON_BYTES) -> Any:
    """Return a JSON file's value; ValueError names the file, FileNotFoundError says that there is none."""
    with open_file(path, most) as file:
        try:
            text = file.read(most + 1)
        except OSError as error:
            raise ValueError(f"{str(path)!r} cannot be read ({error.strerror})") from None
    if len(text) > most:
        raise ValueError(f"{str(path)!r} has more than {most:,} bytes")
    try:
        return parsed(text)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON that can be read ({one_line(error)})") from None


def parsed(text: bytes) -> Any:
    """Return the value of JSON text, None for NaN and infinities; ValueError where there is none."""
    try:
        value = json.loads(text, parse_constant=lambda _: None)
    except RecursionError:
        raise ValueError(f"lists lie more than {DEPTH} deep") from None
    level = [value]
    for _ in range(DEPTH):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _inside(outer)]
        if not level:
            return value
    raise ValueError(f"lists lie more than {DEPTH} deep")


def _inside(outer: dict[str, Any] | list[Any]) -> list[Any]:
    entries = outer.values() if isinstance(outer, dict) else outer
    return [entry for entry in entries if isinstance(entry, dict | list)]


def read_lines(path: Path) -> Iterator[bytes | None]:
    """Yield the lines of a file, None for one that is too long to be kept."""
    with open_file(path, LINES_BYTES) as file:
        while line := file.readline(LINE_BYTES):
            if len(line) == LINE_BYTES and not line.endswith(b"\n"):
                while (rest := file.readline(LINE_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield None
            else:
                yield line


def number(value: Any) -> float | None:
    """Return a value if it is a finite number that an axis can show, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST < value < LARGEST:
        return None
    return value if math.isfinite(value) else None


def numbers(value: Any, most: int) -> dict[str, float]:
    """Return the numbers of a dictionary by name, the first `most` of them; none where it is no dictionary."""
    pairs = value.items() if isinstance(value, dict) else ()
    kept = [(name, found) for name, entry in pairs if (found := number(entry)) is not None]
    return dict(kept[:most])


def one_line(words: object, most: int = 120) -> str:
    """Return words as one short printable line, for a message."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(words))
    return text if len(text) <= most else text[: most - 3] + "..."


def replace(out: Path, text: str) -> None:
    """Write a page in one go; what was there is replaced, and never written through.

    Raises ValueError where that cannot be: `out` is a link, a folder or a device, or its folder is not there.
    """
    if not out.parent.is_dir():
        raise ValueError(f"--out {str(out)!r} lies in a folder that does not exist; name another file")
    if out.is_symlink():
        raise ValueError(f"{str(out)!r} is a symbolic link, which is not followed; remove it, or name a file by --out")
    if out.exists() and not out.is_file():
        raise ValueError(f"{str(out)!r} cannot be written (it is no file); name another file by --out")
    part = out.with_name(f".natgrad-{secrets.token_hex(8)}.part")
    try:
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
            part.replace(out)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{str(out)!r} cannot be written ({error.strerror}); name another file by --out") from None
