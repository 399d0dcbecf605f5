"""Reads the folders of `natgrad train`, while they are written or after, whole or broken.

A line that cannot be read is counted and left out, since a crash or a full disk may have cut it; what says whether a
run without summary.json still goes on is the process that its last start names.
"""

import json
import os
import socket
import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from natgrad_lab.report.number_format import ago, duration

RECENT = 20
"""Steps whose mean says how long a run will still take."""


@dataclass(frozen=True)
class Log:
    """What a run has told. Steps, evaluations and events are lines as they were written."""

    folder: Path
    about: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    summary: dict[str, Any] | None
    broken: int = 0
    age: float = 0.0
    """Seconds since the last line was written."""
    label: str = field(default="", compare=False)

    @cached_property
    def fields(self) -> dict[str, Any]:
        """Return the recipe as flat names and values."""
        return dict(flat(self.about["recipe"]))

    @property
    def starts(self) -> list[dict[str, Any]]:
        """Return the run's starts; runs of earlier versions tell of one."""
        return self.about.get("starts") or [{"step": 0, "machine": self.about.get("machine", {})}]

    @property
    def total(self) -> int:
        """Return the number of steps that the run is to take."""
        changed = [start["changed"].get("steps") for start in self.starts if "changed" in start]
        return next((steps for steps in reversed(changed) if steps), self.about.get("steps", 0))

    @property
    def done(self) -> int:
        """Return the last step that was told."""
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def elapsed(self) -> float:
        """Return the seconds of training so far."""
        return self.steps[-1].get("elapsed", 0.0) if self.steps else 0.0

    @property
    def kind(self) -> str:
        """Return finished, interrupted, failed, running, killed, or unknown: running or killed on another machine."""
        if self.summary is not None:
            return str(self.summary.get("status", "unknown"))
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
        return f"running or killed: {place} done, {last}, on another machine ({self.starts[-1].get('host', '?')})"

    def left(self) -> str:
        """Say how long the run will still train at its present pace."""
        recent = [step["seconds"] for step in self.steps[-RECENT:] if "seconds" in step]
        if not recent:
            return ""
        return f"about {duration((self.total - self.done) * sum(recent) / len(recent))} of training left, "


def read_runs(folders: list[Path]) -> list[Log]:
    """Read runs, each with a label of its own."""
    logs = [read_run(folder) for folder in folders]
    return [_labelled(log, logs) for log in logs]


def read_run(folder: Path) -> Log:
    """Read one run; raise ValueError where there is none."""
    try:
        about = json.loads((folder / "recipe.json").read_text())
        if not isinstance(about["name"], str) or not isinstance(about["recipe"], dict):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{str(folder)!r} has no readable recipe.json; natgrad train writes such folders") from None
    steps, evaluations, events, broken = [], [], [], 0
    places = {"step": steps, "evaluation": evaluations}
    path = folder / "metrics.jsonl"
    for line in path.read_bytes().splitlines() if path.exists() else []:
        read = _line(line)
        broken += read is None
        if read is not None:
            places.get(read["kind"], events).append(read)
    age = max(0.0, time.time() - (path if path.exists() else folder / "recipe.json").stat().st_mtime)
    return Log(folder, about, steps, evaluations, events, _summary(folder), broken, age)


def _line(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "kind" in line and isinstance(line.get("step"), int) else None


def _summary(folder: Path) -> dict[str, Any] | None:
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None


def _alive(start: dict[str, Any]) -> bool | None:
    """Say whether a start's process is there; None where that cannot be seen from here."""
    if start.get("host") != socket.gethostname() or os.name != "posix" or "pid" not in start:
        return None
    try:
        os.kill(start["pid"], 0)
        words = Path(f"/proc/{start['pid']}/cmdline")
        return not words.exists() or b"python" in words.read_bytes() or b"natgrad" in words.read_bytes()
    except PermissionError:
        return True
    except OSError:
        return False


def _labelled(log: Log, logs: list[Log]) -> Log:
    """Name a run after its recipe, and by what tells it from others of that recipe."""
    name = log.about["name"]
    others = [other for other in logs if other is not log and other.about["name"] == name]
    if others and all(differing([log, other]) == ["seed"] for other in others):
        name += f", seed {log.fields.get('seed')}"
    elif others:
        same = any(other.folder.name == log.folder.name for other in others)
        name += f" ({log.folder if same else log.folder.name})"
    return replace(log, label=name)


def differing(logs: list[Log]) -> list[str]:
    """Return the names of the recipe's fields that are not the same in all runs."""
    names = dict.fromkeys(name for log in logs for name in log.fields)
    return [name for name in names if any(log.fields.get(name) != logs[0].fields.get(name) for log in logs)]


def flat(values: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Return nested settings as names with points in them, and values."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        found += flat(value, f"{before}{name}.") if isinstance(value, dict) else [(before + name, value)]
    return found
