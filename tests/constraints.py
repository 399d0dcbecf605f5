"""The exact versions with which the suite was last run: constraints.txt, made from the environment that runs this.

    python tests/constraints.py          (write anew what is installed here; the rest stays as it is)
    python tests/constraints.py --check  (say what is installed here and not pinned, or pinned otherwise)

A version that needs a later Python than the package itself is pinned from that Python on.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "constraints.txt"
HEAD = "# What the tests and the demo were last run with (tests/constraints.py). The package itself allows ranges."
EXTRAS = ("train", "report", "tensorboard", "integrations", "bench", "dev", "docs")
OURS = "natgrad"


def installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def required(requirements: list[str], extras: set[str]) -> Iterator[Requirement]:
    """The requirements that hold here with these extras."""
    for text in requirements:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def closure() -> dict[str, str]:
    """Every distribution that natgrad with all extras stands on and that is installed here, with its version."""
    found, waiting = dict[str, str](), [Requirement(f"{OURS}[{','.join(EXTRAS)}]")]
    seen = set[str]()
    while waiting:
        one = waiting.pop()
        name, known = canonicalize_name(one.name), installed(one.name)
        mark = f"{name}{sorted(one.extras)}"
        if known is None or mark in seen:
            continue
        seen.add(mark)
        if name != OURS:
            found[name] = Version(known.version).public
        waiting += required(known.requires or [], set(one.extras))
    return found


def pin(name: str, version: str) -> str:
    """A line, for the Pythons that the version is for."""
    known = installed(name)
    needs = None if known is None else known.metadata.get("Requires-Python")
    least = re.search(r">=\s*3\.(\d+)", needs or "")
    marker = f' ; python_version >= "3.{least[1]}"' if least and int(least[1]) > 10 else ""
    return f"{name}=={version}{marker}"


def pinned(file: Path = FILE) -> dict[str, str]:
    """The lines of a file by name."""
    lines = [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
    lines = [line for line in lines if line]
    return {canonicalize_name(Requirement(line).name): line for line in lines}


def main() -> None:
    here = {name: pin(name, version) for name, version in closure().items()}
    before = pinned()
    unlike = sorted(line for name, line in here.items() if before.get(name) != line)
    if "--check" in sys.argv:
        print("\n".join(unlike) or "all pinned")
        sys.exit(bool(unlike))
    lines = {**before, **here}
    FILE.write_text("\n".join([HEAD, *(lines[name] for name in sorted(lines))]) + "\n")


if __name__ == "__main__":
    main()
