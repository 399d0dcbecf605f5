"""A comparison as one HTML page with everything in it: no script, no font, no file beside it."""

from html import escape
from typing import Any

from natgrad_lab.report import compare_curves as curves
from natgrad_lab.report import compare_plots as plots
from natgrad_lab.report.compare_read import KINDS, Comparison
from natgrad_lab.report.compare_table import KIND_WORDS, at_edges, fewer_points, findings, headings, rows, verdicts
from natgrad_lab.report.page import document, framed, pair
from natgrad_lab.report.style import look

MEASURES = {"end": "{metric} after all steps", "steps": "steps to the goal", "seconds": "seconds to the goal"}


def page(results: Comparison) -> str:
    """Return the page as text."""
    with look():
        body = "\n".join(section for section in _sections(results) if section)
    return document(f"comparison: {results.name}", body)


def _sections(results: Comparison) -> list[str]:
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings(results))
    sizes = list(reversed(results.batches))
    return [
        f"<header><h1>Comparison: {escape(results.name)}</h1><p>{escape(results.about)}</p></header>",
        f'<ul class="findings">{said}</ul>' if said else "",
        _verdicts(results),
        framed(plots.scaling(results), "Steps to a target against the size of a batch", SCALING),
        framed(plots.ends(results), "Where everyone ends", ENDS),
        *(_size(results, batch, first=batch == sizes[0]) for batch in sizes),
        _choices(results),
        _facts(results),
    ]


SCALING = (
    "Where two budgets are tuned for, the one that gets there sooner; medians over seeds. Along the "
    "dotted line twice the batch takes half the steps; where an optimizer leaves that slope, larger batches stop "
    "helping it. A cross: not reached."
)
ENDS = "Medians over seeds; values far from the best lie outside."
CURVES = (
    "With all steps; lines are medians over seeds, thick for the best of each kind, with their range. Dotted: "
    "the goal, the best first-order optimizer's end."
)


def _size(results: Comparison, batch: str, first: bool) -> str:
    """All about one size of batch; only the largest is open at first."""
    body = (
        _table(results, batch)
        + framed(curves.curves(results, batch), f"Test {results.metric} at batch {batch}", CURVES)
        + pair(
            framed(curves.losses(results, batch), "Training loss"),
            framed(curves.stages(results, batch), "Where a step's time goes"),
        )
        + framed(curves.tuning(results, batch), "What tuning tried")
    )
    title = f"Batch {batch}: {results.samples(batch)} samples, {results.full(batch)} steps"
    return f"<details{' open' if first else ''}><summary>{escape(title)}</summary>{body}</details>"


def _table(results: Comparison, batch: str) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings(results))
    lines = [
        f'<tr class="{row.kind}">' + "".join(f"<td>{escape(cell)}</td>" for cell in row.cells()) + "</tr>"
        for row in rows(results, batch)
    ]
    unit = "%" if results.metric == "accuracy" else "nats"
    note = (
        f"Medians over seeds (range), in {unit}. Goal: {results.text(results.goal(batch))}. Where two budgets are "
        "tuned for, steps and seconds to the goal are of the one that gets there sooner. Share of steps: over the "
        f"steps that the goal's setter had. Seconds count training, not judging. {fewer_points(results, batch)}"
    )
    table = f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return f'<div class="wide">{table}</div><p class="note">{escape(note)}</p>'


def _verdicts(results: Comparison) -> str:
    """Who wins at each size of batch by each measure, marked where it is not ours."""
    head = "".join(
        f"<th>{escape(text)}</th>" for text in ("batch", "by", *(KIND_WORDS[kind] for kind in KINDS), "ahead")
    )
    lines = []
    for verdict in verdicts(results):
        best = [" ".join(verdict.best.get(kind, "-")).strip() for kind in KINDS]
        measure = MEASURES[verdict.measure].format(metric=results.metric)
        ahead = " and ".join(KIND_WORDS[kind] for kind in verdict.winner.split(" and ")) if verdict.winner else "nobody"
        cells = "".join(f"<td>{escape(text)}</td>" for text in (verdict.batch, measure, *best, ahead))
        lines.append(f'<tr class="{"lost" if verdict.lost else ""}">{cells}</tr>')
    table = f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    note = (
        "The best of each kind, by name. Shaded: natgrad is behind. The goal is the best first-order optimizer's end."
    )
    return f'<h2>Who wins</h2><div class="wide">{table}</div><p class="note">{note}</p>'


def _choices(results: Comparison) -> str:
    """What tuning chose, and what of it lies on an edge."""
    lines = []
    for line in results.lines:
        text = ", ".join(
            f"<b>{escape(f'{name} {value}')}</b>" if name in line.at_edge else escape(f"{name} {value}")
            for name, value in line.values.items()
        )
        lines.append(f"<tr><td>{escape(line.name)}</td><td>{line.batch}</td><td>{line.steps}</td><td>{text}</td></tr>")
    head = "<tr><th>optimizer</th><th>batch</th><th>steps</th><th>chosen</th></tr>"
    edges = len(at_edges(results))
    note = f"Bold: on the edge of the declared space (somewhere {edges} numbers); a wider one might hold better."
    table = f'<table class="numbers left"><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table>'
    told = {name: "; ".join(map(": ".join, space.items())) for name, space in results.plan["spaces"].items()}
    spaces = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in told.items())
    return (
        f'<details><summary>What tuning chose</summary><div class="wide">{table}</div>'
        f'<p class="note">{note}</p></details>'
        f'<details><summary>The declared spaces</summary><table class="facts"><tbody>{spaces}</tbody></table></details>'
    )


def _facts(results: Comparison) -> str:
    machine, plan = results.machine, results.plan
    profile, task = plan["profile"], plan["task"]
    facts = {
        "tuning": _tuning(plan),
        "seeds": f"1 to {profile['seeds']}",
        "processes": f"{plan['ranks']} ranks a run, {plan['workers']} runs at a time",
        "machine": f"{machine['device']}, {machine['cores']} cores, {machine['system']}",
        "versions": ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        "commit": ", ".join(sorted({str(run.made_by["commit"]) for line in results.lines for run in line.finals})),
        "network": str(_words(task["recipe"]["model"])),
        "data": str(_words(task["recipe"]["data"])),
        "date": machine["date"],
    }
    lines = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in facts.items())
    command = escape(machine["command"])
    return f'<h2>How this was made</h2><pre>{command}</pre><table class="facts"><tbody>{lines}</tbody></table>'


def _tuning(plan: dict[str, Any]) -> str:
    """How settings were found, or where they were taken from."""
    if plan.get("settings"):
        return "none; settings " + "; ".join(f"at {batch} of {told}" for batch, told in plan["settings"].items())
    profile = plan["profile"]
    halving = ", by successive halving (all at a quarter of the steps, half at half, a quarter at all)"
    again = f", the best {profile['finalists']} again with another seed" if profile["finalists"] > 1 else ""
    return (
        f"{profile['trials']} points each{halving if profile['halving'] else ''}{again}, chosen by loss on "
        f"{plan['task']['held_out']:.0%} of the training samples, held out"
    )


def _words(settings: dict[str, Any]) -> str:
    inner = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "kind")
    return f"{settings['kind']} ({inner})"
