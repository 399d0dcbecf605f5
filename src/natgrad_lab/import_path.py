"""What a name such as `package.module:function` or `./file.py:function` stands for.

Modules are looked for where Python looks, and in the folder from which the command was given.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def is_path(name: str) -> bool:
    """Return whether a name has the form MODULE:ATTRIBUTE, rather than being one of ours."""
    return ":" in name


def resolve(name: str) -> Any:
    """Return what is named; ValueError says in one line what is not there.

    Errors of the module itself, while it is imported, are its author's to see and pass through.
    """
    place, _, attributes = name.rpartition(":")
    if not place or not attributes:
        raise ValueError(f"{name!r} names nothing; write package.module:name or ./file.py:name")
    found: Any = file(place) if place.endswith(".py") else module(place)
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise ValueError(f"{name!r}: there is no {attribute!r} in {place}")
        found = getattr(found, attribute)
    return found


def module(name: str) -> ModuleType:
    """Import a module by its dotted name."""
    _look_in(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            hint = "install it, or write ./file.py:name for a file"
            raise ValueError(f"there is no module {error.name!r}, as in {name!r}; {hint}") from None
        raise
    except TypeError:  # a relative name
        raise ValueError(f"{name!r} is no name of a module; write package.module:name or ./file.py:name") from None


def file(name: str) -> ModuleType:
    """Import a file; the same file once. Its neighbours can be imported by it, as where Python runs it."""
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"there is no file {name!r}")
    _look_in(str(path.parent))
    known = _name_of(path)
    if known in sys.modules:
        return sys.modules[known]
    spec = importlib.util.spec_from_file_location(known, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[known] = made  # dataclasses look their module up while it is being made
    try:
        spec.loader.exec_module(made)
    except BaseException:
        del sys.modules[known]
        raise
    return made


def _name_of(path: Path) -> str:
    """Return the name by which Python imports a file, in other processes too; its path where that is another module."""
    if not path.stem.isidentifier():
        return str(path)
    found = sys.modules[path.stem].__spec__ if path.stem in sys.modules else importlib.util.find_spec(path.stem)
    ours = found is not None and found.origin is not None and Path(found.origin).resolve() == path
    return path.stem if ours else str(path)


def _look_in(folder: str) -> None:
    if folder not in sys.path:
        sys.path.append(folder)
