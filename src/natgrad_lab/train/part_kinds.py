"""Another kind of a recipe's part from the command line: `--model Vgg16`, `--optimizer seng`, `--schedule Cosine`.

A part is a field that is declared as a class with kinds (Architecture, Settings, Schedule, Source). Where an argument
names such a field as a whole, what follows is one of its kinds, in any spelling, or the import path of a class of the
kind; for a model, also of whatever makes a torch module (models/user.py), and for an optimizer, of a
class with torch.optim's interface (optimizers/anybodys.py). The new part begins with its own defaults.
"""

import difflib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, get_type_hints

from torch.optim import Optimizer

from natgrad_lab.data import SOURCES, Source
from natgrad_lab.import_path import is_path, resolve
from natgrad_lab.models import NETWORKS, Architecture, UserModel
from natgrad_lab.models.user import LIBRARIES
from natgrad_lab.schedules import SCHEDULES, Schedule
from natgrad_lab.train.optimizers import OPTIMIZERS, Settings, anybodys

T = TypeVar("T")
Path = tuple[str, ...]
KINDS: dict[type, dict[str, type]] = {
    Architecture: dict(NETWORKS),
    Schedule: dict(SCHEDULES),
    Settings: dict(OPTIMIZERS),
    Source: dict(SOURCES),
}


def swap(default: T, arguments: list[str]) -> tuple[T, list[str]]:
    """Return the value with those parts that arguments name replaced, outer ones first, and the other arguments."""
    used: set[int] = set()
    for place in sorted(range(len(arguments)), key=lambda place: len(_path(arguments[place]))):
        argument = arguments[place]
        declared = dict(parts(default)).get(_path(argument))
        if declared is None or place in used:
            continue
        _, equals, kind = argument.partition("=")
        if not equals and place + 1 < len(arguments):
            kind = arguments[place + 1]
            used.add(place + 1)
        default = _replaced(default, _path(argument), made(declared, kind, argument.partition("=")[0]))
        used.add(place)
    return default, [argument for place, argument in enumerate(arguments) if place not in used]


def parts(value: Any, prefix: Path = ()) -> Iterator[tuple[Path, type]]:
    """Yield the path of every part of nested dataclasses, and the class as which it is declared."""
    hints = get_type_hints(type(value), include_extras=True)
    for entry in fields(value):
        inner, hint = getattr(value, entry.name), hints[entry.name]
        if not is_dataclass(inner):
            continue
        flat = _flat(hint)
        path = prefix if flat else (*prefix, entry.name)
        if not flat and isinstance(hint, type) and kinds(hint):
            yield path, hint
        yield from parts(inner, path)


def kinds(declared: type) -> dict[str, type]:
    """Return a class's kinds by name."""
    return KINDS.get(declared, {})


def offered(value: Any) -> str:
    """Return what `swap` understands, in words; nothing where it has nothing to do."""
    lines = []
    for path, declared in parts(value):
        names = list(kinds(declared))
        names += ["package.module:function"] * (declared is Architecture) + ["package.module:Class"] * (
            declared is Settings
        )
        lines.append(f"  --{'.'.join(path).replace('_', '-')} {' | '.join(names)}")
    return "\n".join(["Other kinds of its parts, whose own fields can then be set:", *lines]) if lines else ""


def made(declared: type, kind: str, flag: str) -> Any:
    """Return a new part; ValueError with near misses where nothing has that name."""
    if is_path(kind):
        return _of_path(declared, kind, flag)
    known = {_plain(name): name for name in kinds(declared)}
    name = known.get(_plain(kind))
    if name is None:
        near = [known[one] for one in difflib.get_close_matches(_plain(kind), known, n=3, cutoff=0.5)]
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose {', '.join(known.values())}"
        more = ", or package.module:function" if declared is Architecture else ""
        raise ValueError(f"{flag} {kind!r} is no kind of {declared.__name__}; {hint}{more}")
    return kinds(declared)[name]()


def _of_path(declared: type, kind: str, flag: str) -> Any:
    """Return the kind at an import path; for models, what is there need not be a kind."""
    if declared is Architecture and kind.partition(":")[0] in LIBRARIES:
        return UserModel(kind)
    found = resolve(kind)
    if isinstance(found, type) and issubclass(found, declared):
        return found()
    if isinstance(found, declared):
        return found
    if declared is Architecture:
        return UserModel(kind)
    if declared is Settings and isinstance(found, type) and issubclass(found, Optimizer):
        return anybodys(kind)
    raise ValueError(f"{flag} {kind} is no kind of {declared.__name__}; choose {', '.join(kinds(declared))}")


def _path(argument: str) -> Path:
    """Return the field that an argument names; () for a value."""
    if not argument.startswith("--"):
        return ()
    return tuple(argument[2:].partition("=")[0].replace("-", "_").split("."))


def _replaced(value: Any, path: Path, part: Any) -> Any:
    """Return nested dataclasses with the part at a path replaced."""
    hints = get_type_hints(type(value), include_extras=True)
    if not hasattr(value, path[0]):
        for entry in fields(value):
            inner = getattr(value, entry.name)
            if _flat(hints[entry.name]) and hasattr(inner, path[0]):
                return replace(value, **{entry.name: _replaced(inner, path, part)})
    new = part if len(path) == 1 else _replaced(getattr(value, path[0]), path[1:], part)
    return replace(value, **{path[0]: new})


def _flat(hint: Any) -> bool:
    """Whether the command line leaves a field's own name out."""
    return any(getattr(mark, "name", None) == "" for mark in getattr(hint, "__metadata__", ()))


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
