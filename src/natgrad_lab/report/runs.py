"""Reads the folders of `natgrad train`, while they are written or after, whole or broken, one's own or a stranger's.

A line that cannot be read is counted and left out, since a crash or a full disk may have cut it; what says whether a
run without summary.json still goes on is the process that its last start names. Of a file of many lines every second,
third, ... step is kept, so that a page takes bounded memory.
"""

import os
import socket
import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from natgrad_lab.report.files import number, numbers, one_line, open_file, parsed, read_json, read_lines
from natgrad_lab.report.markup import text
from natgrad_lab.report.number_format import ago, duration
from natgrad_lab.stored_names import renewed

RECENT = 20
"""Steps whose mean says how long a run will still take."""
KEPT_BYTES = 48 * 2**20
"""Bytes of lines that are kept of a file; of a longer one some steps are left out."""
MOST_LINES, MOST_BROKEN = 10_000_000, 100_000
"""Lines of a file, and lines of it that cannot be read, above which it is none that a run has written."""
FIELDS = 2000
"""Fields of a recipe that are shown at most, and names of a kind in a line."""
STATUSES = ("finished", "interrupted", "failed")
COUNTED = ("stages", "traffic", "intervals")
"""What of a line is a number for each name."""


@dataclass(frozen=True)
class Start:
    """One start of a run: where it was, and what was asked for."""

    step: int = 0
    host: str | None = None
    pid: int | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Log:
    """What a run has recorded. Of a step only numbers are kept, by name; so of an evaluation; events are as written."""

    folder: Path
    name: str
    fields: dict[str, Any]
    """The recipe as flat names and values."""
    planned: int
    starts: list[Start]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    summary: dict[str, Any] | None
    broken: int = 0
    stride: int = 1
    """About one of so many steps is kept."""
    age: float = 0.0
    """Seconds since the last line was written."""
    label: str = field(default="", compare=False)

    @property
    def total(self) -> int:
        """Return the number of steps that the run is to take."""
        changed = [_count(start.changed.get("steps")) for start in self.starts]
        return next((steps for steps in reversed(changed) if steps), self.planned)

    @property
    def done(self) -> int:
        """Return the last step that was recorded."""
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def elapsed(self) -> float:
        """Return the seconds of training so far."""
        return (self.steps[-1].get("elapsed") or 0.0) if self.steps else 0.0

    @property
    def command(self) -> str | None:
        """Return the command that resumes the run, where its summary names one."""
        resume = (self.summary or {}).get("resume")
        return resume if isinstance(resume, str) else None

    @cached_property
    def kind(self) -> str:
        """Return finished, interrupted, failed, running, killed, or unknown: running or killed on another machine."""
        if self.summary is not None:
            status = self.summary.get("status")
            return status if status in STATUSES else "unknown"
        return {True: "running", False: "killed", None: "unknown"}[_alive(self.starts[-1])]

    def status(self) -> str:
        """Say how the run is, in a sentence."""
        kind, last = self.kind, f"{'last line' if self.done else 'begun'} {ago(self.age)}"
        place = f"{self.done} of {self.total} steps" if self.done else "no step"
        if self.summary is not None:
            return f"{kind} after {place} in {duration(self.elapsed)}"
        if kind == "running":
            return f"running: {place} done, {self.left()}{last}"
        if kind == "killed":
            return f"killed: {place} done, its process is gone, {last}"
        return f"running or killed: {place} done, {last}, on another machine ({self.starts[-1].host or '?'})"

    def left(self) -> str:
        """Say how long the run will still train at its present pace."""
        recent = [seconds for step in self.steps[-RECENT:] if (seconds := step.get("seconds")) is not None]
        if not recent:
            return ""
        return f"about {duration(max(0, self.total - self.done) * sum(recent) / len(recent))} of training left, "


def read_runs(folders: list[Path]) -> list[Log]:
    """Read runs, each with a label of its own."""
    logs = [read_run(folder) for folder in folders]
    return [_labelled(log, logs) for log in logs]


def read_run(folder: Path) -> Log:
    """Read one run; raise ValueError where there is none."""
    try:
        about = read_json(folder / "recipe.json")
        name, recipe = about["name"], about["recipe"]
        if not isinstance(name, str) or not isinstance(recipe, dict):
            raise TypeError
    except (FileNotFoundError, KeyError, TypeError):
        raise ValueError(f"{str(folder)!r} has no readable recipe.json; natgrad train writes such folders") from None
    starts = about.get("starts") or [{"machine": about.get("machine")}]  # runs of earlier versions tell of one
    listed = [_start(start) for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []
    path = folder / "metrics.jsonl"
    lines = _Lines()
    try:
        lines.read(path)
        written = path
    except FileNotFoundError:
        written = folder / "recipe.json"
    return Log(
        folder=folder,
        name=text(name, 200),
        fields=dict(flat(renewed(recipe))[:FIELDS]),
        planned=_count(about.get("steps")),
        starts=listed or [Start()],
        steps=lines.steps,
        evaluations=lines.evaluations,
        events=lines.events,
        summary=_summary(folder),
        broken=lines.broken,
        stride=lines.stride,
        age=max(0.0, time.time() - written.stat().st_mtime),
    )


class _Lines:
    """The lines of metrics.jsonl by kind."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.broken, self.stride, self.kept = 0, 1, 0

    def read(self, path: Path) -> None:
        with open_file(path, 2**62) as file:
            self.stride = -(-os.fstat(file.fileno()).st_size // KEPT_BYTES) or 1
        last = None
        for place, line in enumerate(read_lines(path)):
            if place >= MOST_LINES or self.broken > MOST_BROKEN or self.kept > 4 * KEPT_BYTES:
                raise ValueError(
                    f"{str(path)!r} holds too much that is no step of a run; natgrad train writes such files"
                )
            if line is None:
                self.broken += 1
            elif self.stride > 1 and line.startswith(b'{"kind": "step"') and _mixed(place) % self.stride:
                last = line  # without a look inside
            elif self._take(line):
                last = None
        if last is not None:
            self._take(last)

    def _take(self, line: bytes) -> bool:
        """Keep a line; whether it is a step."""
        read = _line(line)
        self.kept += len(line) if read is not None else 0
        if read is None:
            self.broken += 1
        elif read["kind"] == "step":
            self.steps.append(_figures(read))
        else:
            evaluated = read["kind"] == "evaluation"
            (self.evaluations if evaluated else self.events).append(_figures(read) if evaluated else read)
        return read is not None and read["kind"] == "step"


def _mixed(place: int) -> int:
    """Return a number that has no rhythm: what is measured every fifth step would be seen always or never."""
    return (place * 2654435761 & 0xFFFFFFFF) >> 8


def _line(words: bytes) -> dict[str, Any] | None:
    try:
        line = parsed(words)
    except ValueError:
        return None
    good = isinstance(line, dict) and isinstance(line.get("kind"), str) and type(line.get("step")) is int
    return line if good and 0 <= line["step"] < 2**53 else None


def _figures(line: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of a line, None for what is none, and of what is counted by name those numbers."""
    found: dict[str, Any] = {name: number(value) for name, value in line.items() if name not in ("kind", *COUNTED)}
    return found | {name: numbers(line[name], FIELDS) for name in COUNTED if name in line}


def _start(start: dict[str, Any]) -> Start:
    host, pid, step = start.get("host"), start.get("pid"), start.get("step")
    machine, changed = start.get("machine"), start.get("changed")
    return Start(
        _count(step),
        host if isinstance(host, str) else None,
        pid if type(pid) is int and 0 < pid < 2**31 else None,
        machine if isinstance(machine, dict) else {},
        changed if isinstance(changed, dict) else {},
    )


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**53 else 0


def _summary(folder: Path) -> dict[str, Any] | None:
    try:
        summary = read_json(folder / "summary.json")
    except (FileNotFoundError, ValueError):  # it was being written, or the disk was full: the run is not known to end
        return None
    return summary if isinstance(summary, dict) else None


def _alive(start: Start) -> bool | None:
    """Say whether a start's process is there; None where that cannot be seen from here."""
    if start.host != socket.gethostname() or os.name != "posix" or start.pid is None:
        return None
    try:
        os.kill(start.pid, 0)  # signal 0 looks and does nothing
        words = Path(f"/proc/{start.pid}/cmdline")
        return not words.exists() or b"python" in words.read_bytes() or b"natgrad" in words.read_bytes()
    except PermissionError:
        return True
    except OSError:
        return False


def _labelled(log: Log, logs: list[Log]) -> Log:
    """Name a run after its recipe, and by what tells it from others of that recipe."""
    label = log.name
    others = [other for other in logs if other is not log and other.name == label]
    if others and all(differing([log, other]) == ["seed"] for other in others):
        label += f", seed {one_line(log.fields.get('seed'), 20)}"
    elif others:
        same = any(other.folder.name == log.folder.name for other in others)
        label += f" ({log.folder if same else log.folder.name})"
    return replace(log, label=label)


def differing(logs: list[Log]) -> list[str]:
    """Return the names of the recipe's fields that are not the same in all runs."""
    names = dict.fromkeys(name for log in logs for name in log.fields)
    return [name for name in names if any(log.fields.get(name) != logs[0].fields.get(name) for log in logs)]


def flat(values: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Return nested settings as names with points in them, and values."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        inner = f"{before}{text(name, 100)}"
        found += flat(value, f"{inner}.") if isinstance(value, dict) else [(inner, value)]
    return found
