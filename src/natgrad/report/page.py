"""One HTML page with everything in it: no script, no font, no file beside it."""

from html import escape
from importlib.resources import files
from typing import Any

from matplotlib.figure import Figure

from natgrad.report import plots
from natgrad.report.read import Results
from natgrad.report.style import look, picture
from natgrad.report.table import HEADINGS, findings, rows


def page(results: Results) -> str:
    """Return the page as text."""
    with look():
        body = "\n".join(section for section in _sections(results) if section)
    return document(results.title, body)


def document(title: str, body: str) -> str:
    """Return a whole page around its body."""
    css = files("natgrad.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>natgrad - {escape(title)}</title>\n<style>\n{css}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _sections(results: Results) -> list[str]:
    return [
        _head(results),
        _table(results),
        framed(plots.accuracy(results), "Test accuracy by step and by time", _reading(results)),
        pair(
            framed(plots.loss(results), "Training loss by step"),
            framed(plots.stages(results), "Where a step's time goes"),
        ),
        framed(plots.intervals(results), "Steps between measurements, by layer", INTERVALS),
        framed(plots.tuning(results), "What tuning tried", TUNING),
        _facts(results),
    ]


INTERVALS = (
    "A and G are the Kronecker factors of a layer, inputs and output gradients; F is the block of a norm. "
    "A statistic that no longer changes is measured ever more rarely."
)

TUNING = "Accuracy on held-out images, means over seeds; points far below the best lie outside."


def _head(results: Results) -> str:
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings(results))
    listed = f'<ul class="findings">{said}</ul>' if said else ""
    return f"<header><h1>{escape(results.title)}</h1><p>{escape(results.about)}</p></header>\n{listed}"


def _table(results: Results) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in HEADINGS)
    lines = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row.cells()) + "</tr>" for row in rows(results)]
    note = "Medians over seeds; seconds count training, not judging; statistics are what the first rank sends."
    return (
        f'<div class="wide"><table class="numbers"><thead><tr>{head}</tr></thead>'
        f'<tbody>{"".join(lines)}</tbody></table></div><p class="note">{note}</p>'
    )


def _reading(results: Results) -> str:
    several = any(len(curve.runs) > 1 for curve in results.curves)
    short = any(curve.budget != results.baseline.budget for curve in results.curves)
    said = ["Lines are medians over seeds, bands their range."] if several else []
    return " ".join(said + (["Dashed: trained with a shorter budget of steps."] if short else []))


def framed(figure: Figure | None, alternative: str, caption: str = "") -> str:
    """Return a figure and its caption, nothing if there is none."""
    if figure is None:
        return ""
    note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{picture(figure, alternative)}{note}</figure>"


def pair(left: str, right: str) -> str:
    """Put two figures beside one another."""
    return f'<div class="pair">{left}{right}</div>' if left and right else left or right


def _facts(results: Results) -> str:
    machine: dict[str, Any] = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    facts = {
        **results.facts,
        **{f"{entry['name']}, chosen": _values(entry["values"]) for entry in results.tuned},
        "machine": f"{machine['device']}, {machine['cores']} cores, {machine['system']}",
        "ranks": f"{machine['ranks']}, {machine['threads']} threads each",
        "versions": f"python {machine['python']}, {versions}",
        "commit": machine["commit"] or "not run from a git checkout",
        "date": machine["date"],
    }
    lines = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in facts.items())
    command = escape(machine["command"])
    return f'<h2>How this was made</h2><pre>{command}</pre><table class="facts"><tbody>{lines}</tbody></table>'


def _values(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
