"""The page of one run or several: how they are, what they have reached, their figures, how they were made."""

import math
from html import escape
from statistics import fmean, median
from typing import Any

from natgrad_lab.report import run_plots as plots
from natgrad_lab.report.number_format import ago, brief, duration, number, size
from natgrad_lab.report.page import document, framed, pair
from natgrad_lab.report.runs import Log, differing
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
    "refreshed",
    "sent per step",
    "memory",
    "training time",
)
INTERVALS = (
    "A and G are the Kronecker factors of a layer, inputs and output gradients; F is the block of a norm. "
    "A statistic that no longer changes is measured ever more rarely."
)


def page(logs: list[Log]) -> str:
    """Return the page as text."""
    title = f"Run: {logs[0].label}" if len(logs) == 1 else f"{len(logs)} runs"
    with look():
        body = "\n".join(section for section in _sections(title, logs) if section)
    return document(title, body)


def _sections(title: str, logs: list[Log]) -> list[str]:
    return [
        f"<header><h1>{escape(title)}</h1><p>What natgrad train has recorded.</p></header>",
        "".join(_banner(log, len(logs) > 1) for log in logs),
        _table(logs),
        framed(plots.progress(logs), "Loss and test accuracy", _reading(logs)),
        framed(plots.numbers(logs), "Learning rate, damping, refreshed statistics, memory and speed by step"),
        _costs(logs),
        "".join(_intervals(log, len(logs) > 1) for log in logs),
        _differences(logs),
        "".join(_events(log, len(logs) > 1) for log in logs),
        "<h2>How this was made</h2>",
        "".join(_made(log, len(logs) > 1) for log in logs),
    ]


def _costs(logs: list[Log]) -> str:
    traffic = plots.traffic(logs)
    times = plots.stages(logs, wide=traffic is None)
    return pair(framed(times, "Where a step's time goes"), framed(traffic, "What rank 0 sends in a step"))


def _intervals(log: Log, several: bool) -> str:
    """Show how long statistics are kept; of several runs, to be opened."""
    figure = framed(plots.intervals(log), "Steps between measurements, by layer", INTERVALS)
    if not figure or not several:
        return figure
    return f"<details><summary>Intervals by layer: {escape(log.label)}</summary>{figure}</details>"


def _banner(log: Log, several: bool) -> str:
    """Say how a run is; and what a user should know or could do."""
    kind, said = log.kind, [log.status()]
    if log.summary is not None and log.summary.get("resume"):
        said.append(f"to go on: {log.summary['resume']}")
    elif kind in ("killed", "unknown"):
        saved = [event["step"] for event in log.events if event["kind"] == "checkpoint"]
        said.append(f"last checkpoint: step {saved[-1]}" if saved else "no checkpoint was recorded")
    if log.broken:
        said.append(f"{log.broken} unreadable line{'s' if log.broken > 1 else ''} of metrics.jsonl left out")
    lost = sum(line.get("loss") is None for line in log.steps)
    if lost:
        said.append(f"the loss was no number in {lost} step{'s' if lost > 1 else ''}")
    name = f"<b>{escape(log.label)}</b> " if several else ""
    return f'<div class="status {kind}">{name}{"<br>".join(escape(text) for text in said)}</div>'


def _table(logs: list[Log]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in HEADINGS)
    lines = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells(log)) + "</tr>" for log in logs]
    note = "Step time and images/s: medians; refreshed and sent (by rank 0): means; training time leaves judging out."
    return (
        f'<div class="wide"><table class="numbers tight"><thead><tr>{head}</tr></thead>'
        f'<tbody>{"".join(lines)}</tbody></table></div><p class="note">{note}</p>'
    )


def cells(log: Log) -> list[str]:
    """Return a run's figures as text, in the order of the headings."""
    judged = [line for line in log.evaluations if isinstance(line.get("test_accuracy"), float)]
    best = max(judged, key=lambda line: line["test_accuracy"], default=None)
    sent = [sum(line["traffic"].values()) for line in log.steps if line.get("traffic")]
    last = log.steps[-1] if log.steps else {}
    return [
        log.label,
        f"{log.done}/{log.total}",
        f"{last['epoch']:.1f}" if "epoch" in last else "-",
        _told([last.get("loss")], number),
        f"{100 * judged[-1]['test_accuracy']:.2f}" if judged else "-",
        f"{100 * best['test_accuracy']:.2f} ({best['step']})" if best else "-",
        _told([line.get("seconds") for line in log.steps], lambda values: brief(values), median),
        _told([line.get("images_per_second") for line in log.steps], lambda value: f"{value:.0f}", median),
        _told([line.get("refreshed") for line in log.steps], lambda value: f"{value:.0%}", fmean),
        size(fmean(sent)) if sent else "-",
        _told([line.get("memory") for line in log.steps], size, max),
        duration(log.elapsed),
    ]


def _told(values: list[Any], text: Any, together: Any = max) -> str:
    """Return what some numbers come to as text, a dash where there are none."""
    there = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return text(together(there)) if there else "-"


def _reading(logs: list[Log]) -> str:
    said = []
    if len({plots.shade(logs, log) for log in logs}) < min(len(logs), len(COLOURS)):
        said.append("Runs of one recipe, whatever their seeds, share a colour.")
    if any(len(log.steps) > plots.POINTS for log in logs):
        said.append("Lines are means over neighbouring steps, bands their range.")
    return " ".join(said)


def _differences(logs: list[Log]) -> str:
    """Show the fields of the recipes that are not the same in all runs."""
    names = differing(logs)
    if len(logs) == 1 or not names:
        return ""
    head = "".join(f"<th>{escape(log.label)}</th>" for log in logs)
    lines = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(f"<td>{escape(str(log.fields.get(name, '-')))}</td>" for log in logs)
        + "</tr>"
        for name in names
    )
    table = f'<table class="facts"><thead><tr><th></th>{head}</tr></thead><tbody>{lines}</tbody></table>'
    return f'<h2>Where the recipes differ</h2><div class="scroll">{table}</div>'


def _events(log: Log, several: bool) -> str:
    """List what happened beside steps and evaluations."""
    if not log.events:
        return ""
    left = len(log.events) - EVENTS
    before = f"<tr><th></th><td>{left} earlier ones</td></tr>" if left > 0 else ""
    lines = "".join(
        f"<tr><th>step {event['step']}</th><td>{escape(_words(event))}</td></tr>" for event in log.events[-EVENTS:]
    )
    name = f": {escape(log.label)}" if several else ""
    return f'<h2>What happened{name}</h2><table class="facts"><tbody>{before}{lines}</tbody></table>'


def _words(event: dict[str, Any]) -> str:
    rest = {name: value for name, value in event.items() if name not in ("kind", "step")}
    told = rest["text"] if set(rest) == {"text"} else ", ".join(f"{name} {value}" for name, value in rest.items())
    return event["kind"].replace("_", " ") + (f": {told}" if told else "")


def _made(log: Log, several: bool) -> str:
    """Show each start's command, machine and versions, and the recipe."""
    name = f"<h3>{escape(log.label)}</h3>" if several else ""
    starts = "".join(_start(start, len(log.starts) > 1) for start in log.starts)
    fields = "".join(f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in log.fields.items())
    recipe = f'<details><summary>The recipe, field by field</summary><table class="facts">{fields}</table></details>'
    where = f'<p class="note">{escape(str(log.folder))}, last written {ago(log.age)}; seed {log.fields.get("seed")}</p>'
    return name + where + starts + recipe


def _start(start: dict[str, Any], several: bool) -> str:
    machine = {name: value for name, value in start.get("machine", {}).items() if value is not None}
    command = machine.pop("command", "")
    versions = machine.pop("versions", {})
    if versions:
        machine["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    if "changed" in start:
        machine["changed"] = start["changed"]
    lines = "".join(f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in machine.items())
    since = f'<p class="note">from step {start["step"]} on</p>' if several else ""
    return f'{since}<pre>{escape(command)}</pre><table class="facts"><tbody>{lines}</tbody></table>'
