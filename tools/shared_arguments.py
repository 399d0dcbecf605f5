"""An extension of griffe: the optimizers' arguments as their signatures have them.

A constructor says `**shared: Unpack[SharedByFactors]`. The page of an optimizer has each of these arguments, with type,
default and description. Descriptions are those of natgrad_lab.docstrings, which `natgrad train --help` shows too.
"""

import inspect
from typing import Any

import griffe

import natgrad
from natgrad_lab.docstrings import words


def optimizers() -> list[type]:
    """The classes whose pages have arguments written out."""
    return [natgrad.SPNGD, natgrad.KFAC, natgrad.SENG, natgrad.NLCG, natgrad.Preconditioner]


def shown(default: Any) -> str:
    """A default as one would write it."""
    return default.__name__ if inspect.isfunction(default) else repr(default)


class SharedArguments(griffe.Extension):
    """Writes out `**shared` in signatures and docstrings."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        if pkg.path != "natgrad":
            return
        for kind in optimizers():
            module = kind.__module__.partition(".")[2]
            self._complete(pkg[f"{module}.{kind.__name__}"], kind)

    def _complete(self, page: griffe.Class, kind: type) -> None:
        """Give a class all its arguments, in the signature and in the docstring."""
        function = page["__init__"]
        meant = words(kind)
        known = {p.name: p for p in function.parameters}
        complete = [known["self"]]
        lines = []
        for name, parameter in inspect.signature(kind).parameters.items():
            if name not in known:
                known[name] = griffe.Parameter(
                    name,
                    annotation=inspect.formatannotation(parameter.annotation).replace("typing.", ""),
                    kind=griffe.ParameterKind.keyword_only,
                    default=shown(parameter.default),
                )
            complete.append(known[name])
            if name not in meant:
                raise ValueError(f"{kind.__name__}: no docstring says what {name}= is")
            lines.append(f"    {name}: {meant[name]}")
        function.parameters = griffe.Parameters(*complete)
        before, _, after = page.docstring.value.partition("\nArgs:\n")
        rest = after.partition("\n\n")[2]
        parts = (before, "Args:\n" + "\n".join(lines), rest)
        page.docstring.value = "\n\n".join(part.strip("\n") for part in parts if part)
