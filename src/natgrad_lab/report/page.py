"""What every page is made of: one HTML file with everything in it, no script, no font, no file beside it."""

from collections.abc import Iterable, Sequence
from importlib.resources import files

from natgrad_lab.report.markup import NOTHING, Markup, tag, void
from natgrad_lab.report.style import palette

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""A browser that is told this runs no script and loads nothing, whatever the page holds."""


def document(title: str, sections: Iterable[Markup]) -> str:
    """Return a whole page around its sections, of which empty ones are left out."""
    css = files("natgrad_lab.report").joinpath("page.css").read_text(encoding="utf-8")
    head = [
        void("meta", charset="utf-8"),
        void("meta", http_equiv="Content-Security-Policy", content=Markup(POLICY)),
        void("meta", name="viewport", content="width=device-width, initial-scale=1"),
        void("meta", name="color-scheme", content="light dark"),
        tag("title", f"natgrad - {title}"),
        tag("style", Markup(f"\n{palette()}\n{css}")),
    ]
    body = Markup("\n".join(section for section in sections if section))
    page = tag("html", tag("head", head), Markup("\n"), tag("body", tag("main", body)), lang="en")
    return f"<!doctype html>\n{page}\n"


def numbers(
    heads: Sequence[str], rows: Iterable[Sequence[str]], kinds: Iterable[str] = (), style: str = "numbers"
) -> Markup:
    """Return a table of numbers in a box that scrolls by itself; `kinds` are the rows' classes."""
    listed = list(rows)
    classes = list(kinds) or [""] * len(listed)
    lines = [
        tag("tr", [tag("td", cell) for cell in cells], class_=kind or False) for cells, kind in zip(listed, classes)
    ]
    head = tag("thead", tag("tr", [tag("th", one) for one in heads]))
    return tag("div", tag("table", head, tag("tbody", lines), class_=style), class_="wide", tabindex="0")


def facts(pairs: Iterable[tuple[str, str]], heads: Sequence[str] = ()) -> Markup:
    """Return names and what is to be said of each, in a box that scrolls by itself."""
    lines = [tag("tr", tag("th", name), tag("td", said)) for name, said in pairs]
    top = tag("thead", tag("tr", [tag("th", one) for one in heads])) if heads else NOTHING
    return tag("div", tag("table", top, tag("tbody", lines), class_="facts"), class_="scroll")


def note(words: str) -> Markup:
    """Return what a reader has to know of a table."""
    return tag("p", words, class_="note") if words else NOTHING


def folded(title: str, *body: Markup, opened: bool = False) -> Markup:
    """Return a part that a reader opens."""
    return tag("details", tag("summary", title), *body, open=opened)
