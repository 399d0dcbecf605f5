"""HTML that is escaped by construction: a text becomes HTML in `tag` alone, which escapes it."""

import re
from collections.abc import Iterable
from html import escape

LETTERS = 2000
"""The longest text of one element; more of it is cut off."""
UNSHOWN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control letters, halves of pairs, and what turns the direction of writing."""


class Markup(str):
    """Finished HTML. Every other string is text."""

    __slots__ = ()


NOTHING = Markup("")
Child = str | Iterable[str]


def text(value: object, most: int = LETTERS) -> str:
    """Return a value as text that can be shown: no control letters, at most so many letters."""
    words = str(value)
    words = words if len(words) <= most else words[: most - 1] + "\u2026"
    return UNSHOWN.sub("\ufffd", words)


def join(*children: Child) -> Markup:
    """Put pieces behind one another; what is not finished is escaped."""
    parts: list[str] = []
    for child in children:
        pieces = (child,) if isinstance(child, str) else child
        parts += [piece if isinstance(piece, Markup) else escape(text(piece)) for piece in pieces]
    return Markup("".join(parts))


def tag(name: str, /, *children: Child, **attributes: str | bool) -> Markup:
    """Return an element; `class_` stands for class, an attribute that is True stands alone, False is left out."""
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(_attribute(value))}"')
        for key, value in attributes.items()
        if value is not False
    )
    return Markup(f"<{name}{given}>{join(*children)}</{name}>")


def void(name: str, /, **attributes: str) -> Markup:
    """Return an element without content."""
    return Markup(tag(name, **attributes).removesuffix(f"</{name}>"))


def _attribute(value: str | bool) -> str:
    return str(value) if isinstance(value, Markup) else text(value)
