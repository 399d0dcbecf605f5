"""What docstrings say of arguments: the entries of `Args:` and `Attributes:`, and of what they refer to.

An entry is `name: text` or `one, another: text`. Two forms refer to other docstrings: `name: as for SPNGD.` has the
text of natgrad.SPNGD's argument, `**shared: see module.Class.` has all entries of that class.
"""

import inspect
import re
import sys
from importlib import import_module
from typing import is_typeddict

import natgrad

SECTION = re.compile(r"^(?:Args|Attributes):\n((?:[ \t]+.*\n|\n)+)", re.MULTILINE)
ENTRY = re.compile(r"^ {4}(\**\w+(?:, \w+)*):(.*(?:\n {5,}.*)*)", re.MULTILINE)
AS_FOR = re.compile(r"as for (\w+)\.(?: (.*))?")
SEE = re.compile(r"see ([\w.]+)\.(\w+)\.")


def words(kind: type) -> dict[str, str]:
    """The text of every argument of a class, also of those that it has from its base classes."""
    found = {name: text for base in reversed(kind.__mro__) for name, text in entries(base).items()}
    return {name: found[name] for name in inspect.signature(kind).parameters if name in found}


def entries(kind: type) -> dict[str, str]:
    """The text of every argument that the class's own docstring has or refers to, each as one line.

    A TypedDict does not know its bases: the keys that it has from another one of its module are said there.
    """
    found: dict[str, str] = {}
    if is_typeddict(kind):
        for other in vars(sys.modules[kind.__module__]).values():
            if is_typeddict(other) and other.__annotations__.keys() < kind.__annotations__.keys():
                found |= entries(other)
    for section in SECTION.findall(inspect.cleandoc(kind.__doc__ or "") + "\n"):
        for names, lines in ENTRY.findall(section):
            for name in names.split(", "):
                found |= referred(name, " ".join(lines.split()))
    return found


def referred(name: str, text: str) -> dict[str, str]:
    """One entry, or those that it refers to."""
    if see := SEE.match(text):
        return entries(getattr(import_module(see[1]), see[2]))
    if other := AS_FOR.fullmatch(text):
        theirs = words(getattr(natgrad, other[1])).get(name, "")
        text = f"{theirs} {other[2]}" if other[2] else theirs
    return {name: text[:1].upper() + text[1:]}
