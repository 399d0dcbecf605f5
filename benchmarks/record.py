"""Results of benchmarks as JSON: what they were measured on, and which cases are done already."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import natgrad


def read(path: Path) -> dict[str, Any]:
    """The results of a benchmark that has been run."""
    if not path.exists():
        raise SystemExit(f"{path} is not there yet: run the script without --show first")
    return json.loads(path.read_text())


class Record:
    """A file of cases, written after each of them: a run that was stopped goes on where it was.

    outcomes: cases say what became of something, not how fast. So cases of other commits and machines stay, and each
    says of which it is. facts: what else must be the same for results to stand in one file.
    """

    def __init__(self, path: Path, device: str, outcomes: bool = False, **facts: Any):
        self.path, self.origin = path, ("commit", "machine") if outcomes else ()
        self.content: dict[str, Any] = {
            "machine": machine(device),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "natgrad": natgrad.__version__,
            "commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "src") else ""),
            **facts,
        }
        old = json.loads(path.read_text()) if path.exists() else {}
        same = all(old.get(key) == value for key, value in self.content.items() if key not in self.origin)
        self.content["cases"] = [{**{key: old[key] for key in self.origin}, **c} for c in old["cases"]] if same else []

    def find(self, case: dict[str, Any]) -> list[dict[str, Any]] | None:
        """The rows of a case that was measured with what must be the same."""
        known = ({k: v for k, v in c.items() if k not in self.origin} for c in self.content["cases"])
        found = [c["rows"] for c in known if {**c, "rows": None} == {**case, "rows": None}]
        return found[0] if found else None

    def add(self, case: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Write down a case."""
        origin = {key: self.content[key] for key in self.origin}
        self.content["cases"].append({**origin, **case, "rows": rows})
        self.write()

    def write(self) -> None:
        """Bring the file up to date."""
        self.path.parent.mkdir(exist_ok=True, parents=True)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def machine(device: str) -> str:
    """The processor's name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git(*command: str) -> str:
    """What git says; nothing where there is no git, or no repository."""
    return said("git", *command)


def said(*command: str) -> str:
    """What a command prints; nothing where it is not installed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
