"""A comparison in numbers and sentences: who reaches what at each size of batch, who wins, and where ours lose."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from natgrad_lab.report.compare_read import KINDS, Comparison, Line

KIND_WORDS = {"first-order": "first-order", "matrix": "Muon and its kind", "natgrad": "natgrad"}
OF_KIND = {"first-order": "the first-order ones", "matrix": "Muon, Shampoo and SOAP", "natgrad": "natgrad's"}


STAR = "*"
"""Marks an optimizer that was far behind after the first round of tuning."""


@dataclass(frozen=True)
class Row:
    """An optimizer at a size of batch: medians over seeds, of two budgets the better one for each figure."""

    name: str
    kind: str
    end: str
    half: str
    steps: float
    """Steps until the goal, infinite where not reached."""
    given: int
    """The steps that the best first-order optimizer was given to set the goal."""
    seconds: float
    train_loss: str
    step_ms: float
    edges: list[str]
    far_behind: bool = False
    goal: bool = True
    """Whether there is a goal: a first-order optimizer that has not diverged."""

    def cells(self) -> list[str]:
        """The figures as text, in the order of HEADINGS."""
        reached = math.isfinite(self.steps)
        return [
            self.name + STAR * self.far_behind,
            self.end,
            self.half,
            f"{self.steps:g} of {self.given}" if reached else "never" if self.goal else "-",
            f"{self.seconds:.1f}" if reached else "-",
            self.train_loss,
            f"{1e3 * self.step_ms:.0f}" if self.step_ms < math.inf else "-",
        ]


HEADINGS = (
    "optimizer",
    "{metric}, all steps",
    "{metric}, half of them",
    "steps to goal",
    "seconds to goal",
    "train loss",
    "ms a step",
)
HALF = 2
"""Where a row has the end after half of the steps."""

NARROW = (
    "\noptimizer",
    "{metric},\nall steps",
    "\nhalf of them",
    "steps\nto goal",
    "seconds\nto goal",
    "train\nloss",
    "ms a\nstep",
)
"""The headings for a terminal of 80 letters, where ranges have a line of their own."""


def headings(results: Comparison) -> list[str]:
    """Return what stands above a row's cells."""
    return [heading.format(metric=f"test {results.metric}") for heading in HEADINGS]


def rows(results: Comparison, batch: str) -> list[Row]:
    """Return a row for each optimizer, those that need the fewest steps first."""
    found = [_row(results, batch, name) for name in results.names if results.at(batch, name)]
    return sorted(found, key=lambda row: (row.steps, row.seconds))


def _row(results: Comparison, batch: str, name: str) -> Row:
    lines, goal = results.at(batch, name), results.goal(batch)
    steps, seconds = results.fewest(batch, name, goal)
    full, half = lines[0], lines[-1]
    return Row(
        name=name,
        kind=full.kind,
        end=spread(full, results),
        half=spread(half, results) if half is not full else "-",
        steps=steps,
        given=results.full(batch),
        seconds=seconds,
        train_loss=f"{median(full.train_losses()):.2g}" if full.train_losses() else "-",
        step_ms=full.step_seconds(),
        edges=full.at_edge,
        far_behind=full.far_behind,
        goal=goal is not None,
    )


def fewer_points(results: Comparison, batch: str) -> str:
    """Say what the star in a table means; empty where no optimizer has one."""
    if not any(line.far_behind for line in results.at(batch)):
        return ""
    share = results.plan["profile"]["far_behind"]
    return (
        f"{STAR} Far behind after the first round of tuning (less than {share:g} of the best optimizer's progress), so "
        "that one point went on instead of several."
    )


def spread(line: Line, results: Comparison) -> str:
    """The median end and the range over seeds; how many diverged."""
    ends, lost = line.ends(results.column), len(line.finals) - len(line.ends(results.column))
    if not ends:
        return "diverged"

    def text(value: float) -> str:
        if results.metric == "accuracy":
            return f"{100 * value:.1f}"
        return f"{value:.3f}" if value < 100 else f"{value:.0e}"

    gone = f", {lost} diverged" if lost else ""
    return f"{text(median(ends))} ({text(min(ends))}-{text(max(ends))}{gone})"


@dataclass(frozen=True)
class Verdict:
    """Who is best at a size of batch by one measure: of each kind the best optimizer with its figure as text."""

    batch: str
    measure: str
    best: dict[str, tuple[str, str]]
    winner: str
    """The kind that wins; several with " and " where they are level; empty where nobody reaches the goal."""

    @property
    def lost(self) -> bool:
        """Whether an optimizer of another kind is ahead of ours."""
        return bool(self.winner) and "natgrad" not in self.winner and "natgrad" in self.best


def verdicts(results: Comparison) -> list[Verdict]:
    """Three measures at every size of batch: the end, steps to the goal, seconds to the goal."""
    found = []
    for batch in results.batches:
        goal = results.goal(batch)
        ends = {line.name: line.end(results.column) for line in results.at(batch) if line.steps == results.full(batch)}
        sign = -1.0 if results.metric == "accuracy" else 1.0
        signed = {name: math.inf if end is None else sign * end for name, end in ends.items()}
        found.append(_verdict(results, batch, "end", signed, lambda value, s=sign: results.text(s * value)))
        if goal is None:
            continue
        for place, measure in enumerate(("steps", "seconds")):
            reached = {name: results.fewest(batch, name, goal)[place] for name in ends}
            found.append(_verdict(results, batch, measure, reached, lambda value: f"{value:.3g}"))
    return found


def _verdict(
    results: Comparison, batch: str, measure: str, values: dict[str, float], text: Callable[[float], str]
) -> Verdict:
    best: dict[str, tuple[str, str]] = {}
    least: dict[str, float] = {}
    for kind in KINDS:
        of_kind = {line.name: values[line.name] for line in results.at(batch, kind=kind) if line.name in values}
        if not of_kind:
            continue
        name = min(of_kind, key=lambda one: of_kind[one])
        least[kind] = of_kind[name]
        best[kind] = (name, text(least[kind])) if math.isfinite(least[kind]) else ("never", "")
    lowest = min(least.values(), default=math.inf)
    winners = [kind for kind, value in least.items() if value == lowest] if math.isfinite(lowest) else []
    return Verdict(batch, measure, best, " and ".join(winners))


def findings(results: Comparison) -> list[str]:
    """Say what the comparison shows: at each size of batch the goal and who reaches it, and where ours lose."""
    said = []
    for batch in reversed(results.batches):
        line, goal = results.goal_line(batch), results.goal(batch)
        if line is None:
            continue
        where = f"Batch {batch}" + (f" ({results.samples(batch)} samples)" if batch == "full" else "")
        best = f"{where}: {line.name}, the best tuned first-order optimizer, ends at {results.text(goal)}"
        said.append(f"{best} after {line.steps} steps (the goal). {_reaching(results, batch, 'first-order')[0]}")
        said += _reaching(results, batch, "natgrad") + _reaching(results, batch, "matrix")
    return said + losses(results)


def _reaching(results: Comparison, batch: str, kind: str) -> list[str]:
    """The best of a kind at a size of batch, by steps to the goal."""
    names = [name for name in results.names if results.at(batch, name, kind)]
    if not names:
        return []
    reached = {name: results.fewest(batch, name, results.goal(batch)) for name in names}
    name = min(names, key=lambda one: reached[one])
    steps, seconds = reached[name]
    if not math.isfinite(steps):
        return [f"Of {OF_KIND[kind]} none gets there."]
    full = results.full(batch)
    return [f"Of {OF_KIND[kind]} {name} is there first, after {steps:g} of {full} steps and {seconds:.1f} s."]


MEASURES = {"end": "in {metric} after all steps", "steps": "in steps to the goal", "seconds": "in seconds to the goal"}


def losses(results: Comparison) -> list[str]:
    """Where an optimizer of another kind is ahead of ours."""
    said = []
    for verdict in verdicts(results):
        if not verdict.lost:
            continue
        kind = verdict.winner.split(" and ")[0]
        (other, theirs), (name, ours) = verdict.best[kind], verdict.best["natgrad"]
        what = MEASURES[verdict.measure].format(metric=results.metric)
        said.append(f"Behind at batch {verdict.batch} {what}: {other} {theirs}, natgrad's {name} {ours}".rstrip() + ".")
    return said


def at_edges(results: Comparison) -> list[str]:
    """Chosen values on the edge of what was declared: a wider space might hold better ones."""
    found: dict[tuple[str, str], list[str]] = {}
    for line in results.lines:
        for name in line.at_edge:
            found.setdefault((line.name, name), []).append(f"{line.values[name]} at {line.batch}, {line.steps} steps")
    return [f"{name}: {value} ({'; '.join(where)})" for (name, value), where in found.items()]
