"""What every page is made of: one HTML file with everything in it, no script, no font, no file beside it."""

from html import escape
from importlib.resources import files

from matplotlib.figure import Figure

from natgrad_lab.report.style import picture


def document(title: str, body: str) -> str:
    """Return a whole page around its body."""
    css = files("natgrad_lab.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>natgrad - {escape(title)}</title>\n<style>\n{css}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def framed(figure: Figure | None, alternative: str, caption: str = "") -> str:
    """Return a figure and its caption, nothing if there is none."""
    if figure is None:
        return ""
    note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{picture(figure, alternative)}{note}</figure>"


def pair(left: str, right: str) -> str:
    """Put two figures beside one another."""
    return f'<div class="pair">{left}{right}</div>' if left and right else left or right
