"""A comparison as one HTML page with everything in it: no script, no font, no file beside it."""

from collections.abc import Sequence
from typing import Any

from natgrad_lab.report import compare_curves as curves
from natgrad_lab.report import compare_plots as plots
from natgrad_lab.report.compare_read import KINDS, Comparison
from natgrad_lab.report.compare_table import (
    HALF,
    KIND_WORDS,
    at_edges,
    fewer_points,
    findings,
    headings,
    rows,
    verdicts,
)
from natgrad_lab.report.critical import Measured, section, words
from natgrad_lab.report.drawing import framed, pair
from natgrad_lab.report.markup import NOTHING, Markup, join, tag, text
from natgrad_lab.report.page import document, facts, folded, note, numbers
from natgrad_lab.report.style import look

MEASURES = {"end": "{metric} after all steps", "steps": "steps to the goal", "seconds": "seconds to the goal"}
FINDINGS = 8
"""Sentences that are shown at once."""
SCALING = (
    "The goal is where the best first-order optimizer ends. Medians over seeds; where an optimizer was tuned for two "
    "numbers of steps, the one that gets there sooner. Along the line of linear scaling twice the batch takes half of "
    "the steps. At the critical batch an optimizer takes 20 % more than that, counted from the batch at which it needs "
    "the fewest samples: larger batches stop helping it."
)
ENDS = "Medians over seeds; values far from the best lie outside."
CURVES = "With all steps. Lines are medians over seeds. The goal is where the best first-order optimizer ends."
VERDICTS = (
    "The best of each kind, by name. Shaded: natgrad is behind. The goal is the best first-order optimizer's end."
)


def page(results: Comparison, measured: Sequence[Measured] = ()) -> str:
    """Return the page as text; `measured` are critical batches that lie beside the comparison."""
    with look():
        return document(f"comparison: {results.name}", _sections(results, measured))


def _sections(results: Comparison, measured: Sequence[Measured]) -> list[Markup]:
    sizes = list(reversed(results.batches))
    return [
        tag("header", tag("h1", f"Comparison: {results.name}"), tag("p", results.about)),
        _findings(results),
        _verdicts(results),
        framed(plots.scaling(results), "Steps to a target by the size of a batch", SCALING),
        _critical(results),
        *(section(one) for one in measured),
        framed(plots.ends(results), "Where everyone ends", ENDS),
        *(_size(results, batch, first=batch == sizes[0]) for batch in sizes),
        _choices(results),
        _facts(results),
    ]


def _findings(results: Comparison) -> Markup:
    """Say what was found; where that is much, for the largest batch at once and for all of them when it is opened."""
    said = findings(results)
    if not said:
        return NOTHING
    if len(said) <= FINDINGS:
        return _sentences(said)
    starts = [place for place, sentence in enumerate(said) if sentence.startswith("Batch ")]
    first = said[: starts[1]] if len(starts) > 1 else said[:FINDINGS]
    return join(_sentences(first), folded("The same for every size of batch", _sentences(said)))


def _sentences(said: Sequence[str]) -> Markup:
    return tag("ul", [tag("li", sentence) for sentence in said], class_="findings")


def _size(results: Comparison, batch: str, first: bool) -> Markup:
    """All about one size of batch; only the largest is open at first."""
    return folded(
        f"Batch {batch}: {results.samples(batch)} samples, {results.full(batch)} steps",
        _table(results, batch),
        framed(curves.curves(results, batch), f"Test {results.metric} at batch {batch}", CURVES),
        pair(
            framed(curves.losses(results, batch), "Training loss"),
            framed(curves.stages(results, batch), "Where a step's time goes"),
        ),
        framed(curves.tuning(results, batch), "What tuning tried: held-out loss by learning rate"),
        opened=first,
    )


def _table(results: Comparison, batch: str) -> Markup:
    listed = rows(results, batch)
    unit = "%" if results.metric == "accuracy" else "nats"
    goal = results.goal_line(batch)
    told = [f"Medians over seeds (range), in {unit}."]
    if goal is not None:
        told.append(
            f"The goal is where {goal.name} ends after {goal.steps} steps: {results.text(results.goal(batch))}."
        )
    if results.halved:
        told.append(
            "An optimizer was tuned for two numbers of steps; steps and seconds to the goal are of the sooner one."
        )
    told += ["Seconds do not count evaluations.", fewer_points(results, batch)]
    kept = [place for place in range(len(headings(results))) if results.halved or place != HALF]
    cells = [[row.cells()[place] for place in kept] for row in listed]
    table = numbers([headings(results)[place] for place in kept], cells, [row.kind for row in listed])
    return join(table, note(" ".join(told).strip()))


def _critical(results: Comparison) -> Markup:
    """The critical batch of each optimizer, for each target that somebody reaches."""
    found = plots.critical(results)
    if not found:
        return NOTHING
    some = [target for target in results.targets if plots.anybody(results, target)]
    heads = ["critical batch, in samples", *(f"to {results.metric} {results.text(target)}" for target in some)]
    told = "Above: no measured batch takes 20 % more than linear scaling. -: reached at fewer than two sizes of batch."
    return join(numbers(heads, [[name, *map(words, sizes)] for name, sizes in found.items()]), note(told))


def _verdicts(results: Comparison) -> Markup:
    """Who wins at each size of batch by each measure, marked where it is not ours."""
    lines, kinds = [], []
    for verdict in verdicts(results):
        best = [" ".join(verdict.best.get(kind, "-")).strip() for kind in KINDS]
        measure = MEASURES[verdict.measure].format(metric=results.metric)
        ahead = " and ".join(KIND_WORDS[kind] for kind in verdict.winner.split(" and ")) if verdict.winner else "nobody"
        lines.append([verdict.batch, measure, *best, ahead])
        kinds.append("lost" if verdict.lost else "")
    heads = ("batch", "measured by", *(KIND_WORDS[kind] for kind in KINDS), "ahead")
    return join(tag("h2", "Who wins"), numbers(heads, lines, kinds), note(VERDICTS))


def _choices(results: Comparison) -> Markup:
    """What tuning chose, and what of it lies on an edge."""
    lines = []
    for line in results.lines:
        pieces = [
            tag("b", f"{name} {value}") if name in line.at_edge else join(f"{name} {value}")
            for name, value in line.values.items()
        ]
        chosen = Markup(", ".join(pieces))
        lines.append([line.name, line.batch, str(line.steps), chosen])
    heads = ("optimizer", "batch", "steps", "chosen")
    edges = len(at_edges(results))
    told = f"Bold: on the edge of the declared space (somewhere {edges} numbers); a wider one might hold better."
    spaces = [(name, "; ".join(map(": ".join, space.items()))) for name, space in results.plan["spaces"].items()]
    return join(
        folded("What tuning chose", numbers(heads, lines, style="numbers left"), note(told)),
        folded("The declared spaces", facts(spaces)),
    )


def _facts(results: Comparison) -> Markup:
    machine, plan = results.machine, results.plan
    task = plan["task"]
    rows = {
        "tuning": _tuning(plan),
        "seeds": f"1 to {plan['profile']['seeds']}",
        "processes": f"{plan['ranks']} ranks a run, {plan['workers']} runs at a time",
        "machine": f"{machine['device']}, {machine['cores']} cores, {machine['system']}",
        "versions": ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        "commit": ", ".join(sorted({str(run.made_by["commit"]) for line in results.lines for run in line.finals})),
        "network": _words(task["recipe"]["model"]),
        "data": _words(task["recipe"]["data"]),
        "date": machine["date"],
    }
    told = facts((name, text(value, 500)) for name, value in rows.items())
    return join(tag("h2", "How this was made"), tag("pre", str(machine["command"])), told)


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
