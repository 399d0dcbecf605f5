"""Every argument of the optimizers and of their parts as tables, from signatures and docstrings (docs/settings.md).

python benchmarks/arguments.py    prints them; benchmarks/tables.py writes them into the page
"""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass
from typing import Any

import natgrad
from natgrad import optim
from natgrad_lab.docstrings import words
from natgrad_lab.train.optimizers import OPTIMIZERS
from natgrad_lab.train.optimizers.derived import Derived, declared

KINDS = [natgrad.SPNGD, natgrad.KFAC, natgrad.SENG, natgrad.NLCG]
SETTINGS = {kind.makes: kind for kind in OPTIMIZERS.values() if issubclass(kind, Derived)}
NONE = "–"


def of_optimizers() -> str:
    """A row for each argument, with its default in each optimizer; two rows where it means two things."""
    rows: dict[str, dict[str, dict[type, str]]] = {}
    for kind in KINDS:
        meant = words(kind)
        for name, one in inspect.signature(kind).parameters.items():
            rows.setdefault(name, {}).setdefault(meant[name], {})[kind] = default_of(one)
    return table(
        ["argument", *(kind.__name__ for kind in KINDS), "meaning"],
        [
            [code(name), *(defaults.get(kind, NONE) for kind in KINDS), meaning]
            for name, meanings in rows.items()
            for meaning, defaults in meanings.items()
        ],
    )


def of_parts() -> str:
    """A row for each argument of the objects that the optimizers take, with the field that stands for it in recipes."""
    flags: dict[tuple[type, str], list[tuple[str, str, Any]]] = {}
    for kind in (SETTINGS[made] for made in KINDS):
        defaults = {entry.name: entry.default for entry in fields(kind)}
        for name, _, origin in declared(kind):
            if origin.part is not None:
                flags.setdefault((origin.part, origin.name or name), []).append((name, kind.__name__, defaults[name]))
    rows = []
    for part in dict.fromkeys(part for part, _ in flags):
        meant = words(part)
        for name, one in inspect.signature(part).parameters.items():
            own = field_of(flags.get((part, name), []), default_of(one))
            rows.append([code(f"{part.__name__}({name}=)"), default_of(one), own, meant.get(name, "")])
    return table(["argument", "default", "in a recipe", "meaning"], rows)


def field_of(found: list[tuple[str, str, Any]], default: str) -> str:
    """The flag of a field, and its default where it is another one, with the settings that have it unless all do."""
    if not found:
        return NONE
    others: dict[str, list[str]] = {}
    for _, kind, value in found:
        others.setdefault(shown(value), []).append(kind)
    flag = code(f"--optimizer.{found[0][0].replace('_', '-')}")
    if len(others) == 1:
        return flag if default in others else f"{flag}: {next(iter(others))}"
    return f"{flag}: {'; '.join(f'{value} in {and_(kinds)}' for value, kinds in others.items())}"


def and_(names: list[str]) -> str:
    return " and ".join(names)


def default_of(one: inspect.Parameter) -> str:
    """The default of an argument as it is written; "needed" where there is none."""
    return "needed" if one.default is inspect.Parameter.empty else shown(one.default)


def shown(value: Any) -> str:
    """A value as it is written in Python: by its name, or as a call with what is not as usual."""
    known = [name for module in (natgrad, optim) for name in module.__all__ if getattr(module, name) is value]
    if known:
        return code(known[0])
    if is_dataclass(value) and not isinstance(value, type):
        usual = {entry.name: entry.default for entry in fields(value) if entry.init}
        more = [f"{name}={getattr(value, name)!r}" for name in usual if getattr(value, name) != usual[name]]
        return code(f"{type(value).__name__}({', '.join(more)})")
    if isinstance(value, str):
        return code(f'"{value}"')
    return code(value.__name__ if callable(value) else repr(value))


def code(text: str) -> str:
    return f"`{text}`"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(escaped, line))} |" for line in lines)


def escaped(cell: str) -> str:
    """A cell without what Markdown would take for something else."""
    return cell.replace("|", "&#124;").replace("<", "&lt;").replace(" * ", " \\* ")


def made(which: str | None) -> str:
    """The table of a mark."""
    return of_parts() if which == "parts" else of_optimizers()


if __name__ == "__main__":
    print(made(None), made("parts"), sep="\n\n")
