"""An extension of griffe: the optimizers' arguments as their signatures have them.

A constructor says `**shared: Unpack[SharedByFactors]`. The page of an optimizer has each of these arguments, with type,
default and description. An argument that an optimizer's own docstring leaves out has the description of the class that
declares it, or that of SPNGD.
"""

import inspect
from typing import Any

import griffe

import natgrad

HEADINGS = {griffe.DocstringSectionKind.parameters, griffe.DocstringSectionKind.attributes}


def described(docstring: griffe.Docstring | None) -> dict[str, str]:
    """What a docstring says of each argument. A line for several arguments is said of each."""
    found: dict[str, str] = {}
    sections = [] if docstring is None else docstring.parse("google", warnings=False)
    for section in sections:
        if section.kind in HEADINGS:
            for item in section.value:
                found.update({name.strip(" *"): item.description for name in item.name.split(",")})
    return found


def declared(module: griffe.Module, name: str) -> dict[str, str]:
    """What a class of natgrad.optim.arguments and those it is made of say of their arguments."""
    kind = module.classes.get(name)
    if kind is None:
        return {}
    found = described(kind.docstring)
    for base in kind.bases:
        found = {**declared(module, str(base)), **found}
    return found


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
        general = described(pkg["optim.spngd.SPNGD"].docstring)
        for kind in optimizers():
            module = kind.__module__.partition(".")[2]
            self._complete(pkg[f"{module}.{kind.__name__}"], kind, pkg["optim.arguments"], general)

    def _complete(self, page: griffe.Class, kind: type, module: griffe.Module, general: dict[str, str]) -> None:
        """Give a class all its arguments, in the signature and in the docstring."""
        function = page["__init__"]
        unpacked = str(function.parameters["shared"].annotation)  # Unpack[SharedByFactors]
        shared = declared(module, unpacked[unpacked.index("[") + 1 : -1])
        own = described(page.docstring)
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
            text = (own.get(name) or shared.get(name) or general.get(name, "")).strip()
            if text.startswith("as for "):
                text = general[name] + text.partition(".")[2]
            if not text:
                raise ValueError(f"{kind.__name__}: no docstring says what {name}= is")
            lines.append(f"    {name}: {' '.join(text.split())}")
        function.parameters = griffe.Parameters(*complete)
        before, _, after = page.docstring.value.partition("\nArgs:\n")
        rest = after.partition("\n\n")[2]
        parts = (before, "Args:\n" + "\n".join(lines), rest)
        page.docstring.value = "\n\n".join(part.strip("\n") for part in parts if part)
