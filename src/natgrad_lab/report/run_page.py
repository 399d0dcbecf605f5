"""The page of one run or several: how they are, what they have reached, their pictures, how they were made."""

from itertools import groupby
from statistics import fmean, median
from typing import Any

from natgrad_lab.report import run_plots as plots
from natgrad_lab.report.drawing import framed, pair
from natgrad_lab.report.markup import NOTHING, Markup, join, tag, text, void
from natgrad_lab.report.number_format import ago, brief, duration, number, size
from natgrad_lab.report.page import document, facts, folded, note, numbers
from natgrad_lab.report.runs import Log, Start, differing
from natgrad_lab.report.style import COLOURS, look

EVENTS = 40
"""Events that are listed at most, the last ones."""
HEADINGS = (
    "run",
    "steps",
    "epoch",
    "loss",
    "test accuracy, %",
    "best (step)",
    "step time",
    "images/s",
    "measured",
    "sent per step",
    "memory",
    "training time",
)
NOTE = (
    "Step time and images/s: medians. Measured: mean share of the statistics of the curvature that a step measures. "
    "Sent: mean over steps, by rank 0. Training time does not count evaluations."
)
INTERVALS = (
    "A row is a statistic of a layer: A of its inputs and G of its output gradients (the Kronecker factors), F the "
    "block of a normalisation. A statistic that no longer changes is measured ever more rarely."
)


def page(logs: list[Log]) -> str:
    """Return the page as text."""
    title = f"Run: {logs[0].label}" if len(logs) == 1 else f"{len(logs)} runs"
    with look():
        return document(title, _sections(title, logs))


def _sections(title: str, logs: list[Log]) -> list[Markup]:
    several = len(logs) > 1
    return [
        tag("header", tag("h1", title), tag("p", "What natgrad train has recorded.")),
        *(_banner(log, several) for log in logs),
        numbers(HEADINGS, [cells(log) for log in logs], style="numbers tight"),
        note(NOTE),
        framed(plots.progress(logs), "Progress", _reading(logs)),
        framed(plots.numbers(logs), "Step by step"),
        _costs(logs),
        *(_intervals(log, several) for log in logs),
        _differences(logs),
        *(_events(log, several) for log in logs),
        tag("h2", "How this was made"),
        *(_made(log, several) for log in logs),
    ]


def _costs(logs: list[Log]) -> Markup:
    traffic = plots.traffic(logs)
    times = plots.stages(logs, wide=traffic is None)
    return pair(framed(times, "Where a step's time goes"), framed(traffic, "What rank 0 sends in a step"))


def _intervals(log: Log, several: bool) -> Markup:
    """Show how long statistics are kept; of several runs, to be opened."""
    figure = framed(plots.intervals(log), "Steps from one measurement to the next", INTERVALS)
    return folded(f"Measurements by layer: {log.label}", figure) if figure and several else figure


def _banner(log: Log, several: bool) -> Markup:
    """Say how a run is; and what a user should know or could do."""
    kind, said = log.kind, [log.status()]
    if log.command:
        said.append(f"to resume: {log.command}")
    elif kind in ("killed", "unknown"):
        saved = [event["step"] for event in log.events if event["kind"] == "checkpoint"]
        said.append(f"last checkpoint: step {saved[-1]}" if saved else "no checkpoint was recorded")
    if log.broken:
        said.append(f"{log.broken} unreadable line{'s' if log.broken > 1 else ''} of metrics.jsonl left out")
    if log.stride > 1:
        said.append(f"metrics.jsonl is long: about one of {log.stride} steps is shown")
    lost = sum(line.get("loss") is None for line in log.steps)
    if lost:
        said.append(f"the loss was no number in {lost} step{'s' if lost > 1 else ''}")
    lines = [piece for sentence in said for piece in (void("br"), sentence)][1:]
    return tag("div", join(tag("b", log.label), " ") if several else NOTHING, lines, class_=f"status {kind}")


def cells(log: Log) -> list[str]:
    """Return a run's figures as text, in the order of the headings."""
    scored = [line for line in log.evaluations if line.get("test_accuracy") is not None]
    best = max(scored, key=lambda line: line["test_accuracy"], default=None)
    sent = [sum(line["traffic"].values()) for line in log.steps if line.get("traffic")]
    last = log.steps[-1] if log.steps else {}
    return [
        log.label,
        f"{log.done}/{log.total}",
        _told([last.get("epoch")], lambda value: f"{value:.1f}"),
        _told([last.get("loss")], number),
        f"{100 * scored[-1]['test_accuracy']:.2f}" if scored else "-",
        f"{100 * best['test_accuracy']:.2f} ({best['step']})" if best else "-",
        _told([line.get("seconds") for line in log.steps], brief, median),
        _told([line.get("images_per_second") for line in log.steps], lambda value: f"{value:.0f}", median),
        _told([line.get("refreshed") for line in log.steps], lambda value: f"{value:.0%}", fmean),
        size(fmean(sent)) if sent else "-",
        _told([line.get("memory") for line in log.steps], size, max),
        duration(log.elapsed),
    ]


def _told(values: list[Any], words: Any, together: Any = max) -> str:
    """Return what some numbers come to as text, a dash where there are none."""
    there = [value for value in values if value is not None]
    return words(together(there)) if there else "-"


def _reading(logs: list[Log]) -> str:
    if len({plots.shade(logs, log) for log in logs}) < min(len(logs), len(COLOURS)):
        return "Runs of one recipe, whatever their seeds, share a colour."
    return ""


def _differences(logs: list[Log]) -> Markup:
    """Show the fields of the recipes that are not the same in all runs."""
    names = differing(logs)
    if len(logs) == 1 or not names:
        return NOTHING
    head = tag("tr", tag("th"), [tag("th", log.label) for log in logs])
    lines = [
        tag("tr", tag("th", name), [tag("td", text(log.fields.get(name, "-"), 200)) for log in logs]) for name in names
    ]
    table = tag("table", tag("thead", head), tag("tbody", lines), class_="facts")
    return join(tag("h2", "Where the recipes differ"), tag("div", table, class_="scroll", tabindex="0"))


def _events(log: Log, several: bool) -> Markup:
    """List what happened beside steps and evaluations; of many alike in a row, the last one."""
    if not log.events:
        return NOTHING
    groups = [list(alike) for _, alike in groupby(log.events, key=lambda event: (event["kind"], "text" in event))]
    lines: list[tuple[str, str]] = []
    for alike in groups:
        if len(alike) > 3:
            lines.append(
                (f"steps {alike[0]['step']} to {alike[-1]['step']}", f"{len(alike)} times {_words(alike[-1])}")
            )
        else:
            lines += [(f"step {event['step']}", _words(event)) for event in alike]
    left = len(lines) - EVENTS
    before = [("", f"{left} earlier ones")] if left > 0 else []
    return join(tag("h2", f"What happened{f': {log.label}' if several else ''}"), facts(before + lines[-EVENTS:]))


def _words(event: dict[str, Any]) -> str:
    rest = {name: value for name, value in event.items() if name not in ("kind", "step")}
    told = rest["text"] if set(rest) == {"text"} else ", ".join(f"{name} {value}" for name, value in rest.items())
    return event["kind"].replace("_", " ") + (f": {told}" if told else "")


def _made(log: Log, several: bool) -> Markup:
    """Show each start's command, machine and versions, and the recipe."""
    fields = [(name, text(value, 300)) for name, value in log.fields.items()]
    return join(
        tag("h3", log.label) if several else NOTHING,
        note(f"{log.folder}, last written {ago(log.age)}; seed {text(log.fields.get('seed'), 40)}"),
        *(_start(start, len(log.starts) > 1) for start in log.starts[-EVENTS:]),
        folded("The recipe, field by field", facts(fields)),
    )


def _start(start: Start, several: bool) -> Markup:
    machine = {name: value for name, value in start.machine.items() if value is not None}
    command = machine.pop("command", "")
    versions = machine.pop("versions", None)
    if isinstance(versions, dict):
        machine["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    if start.changed:
        machine["changed"] = start.changed
    since = note(f"from step {start.step} on") if several else NOTHING
    rows = [(name, text(value, 500)) for name, value in list(machine.items())[:EVENTS]]
    return join(since, tag("pre", str(command)), facts(rows))
