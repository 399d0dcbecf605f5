"""Everything that the docs' tables are made of, one command; stopped, it goes on where it was.

    make bench                             (the CPU profile, under two hours on two cores)
    make bench DATA=path/to/cifar100       (with the parts that need images, just under two hours)
    python benchmarks/bench.py --plan      (what it would do, and for how long)
    python benchmarks/bench.py --only scaling charlm
    python benchmarks/bench.py --keep runs/cifar100-16 cifar100-16     (a finished comparison, under a name)

Each part is a command of its own that remembers what it has done for this commit; what it writes are the JSON files in
benchmarks/results, a comparison's pictures in docs and, at the end, the tables in the docs. A part that fails does not
keep the others from running.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import git

from natgrad_lab.report.compare_curves import curves
from natgrad_lab.report.compare_plots import scaling
from natgrad_lab.report.compare_read import KINDS, Comparison, read_comparison
from natgrad_lab.report.compare_table import findings, headings, rows, verdicts
from natgrad_lab.report.drawing import sheet
from natgrad_lab.report.style import look
from natgrad_lab.train.log import write_json

HERE = Path(__file__).resolve().parent
COMPARISONS = {
    "demo": ("text", "--profile", "demo", "--ranks", "2"),
    "digits": ("digits", "--profile", "full", "--workers", "2"),
    "charlm": ("charlm", "--profile", "cpu", "--workers", "2"),
    "cifar100-small": ("cifar100-small", "--profile", "cpu", "--workers", "2"),
}
"""What `natgrad compare` is told, by the name of its results; the demo is that of `make demo`."""


@dataclass(frozen=True)
class Part:
    """One command: its name, its words after python, estimated minutes on two cores, whether it needs images."""

    name: str
    words: tuple[str, ...]
    minutes: int
    images: bool = False


def folder_of(name: str) -> Path:
    """Where a comparison's trials are remembered: a folder for each commit."""
    return Path("runs") / f"bench-{git('rev-parse', '--short', 'HEAD') or 'nogit'}" / name


def comparison(name: str, minutes: int, data: str | None) -> Part:
    """A comparison's part, with a profile for CPUs; two runs at a time, or one on two ranks."""
    images = name.startswith("cifar")
    where = ("--data.path", data) if images and data else ()
    words = ("-m", "natgrad_lab", "compare", *COMPARISONS[name], *where, "--out", str(folder_of(name)))
    return Part(name, words, minutes, images)


def parts(data: str | None) -> list[Part]:
    """All parts, quick ones first."""
    images = ("--images", data) if data else ()
    return [
        Part("micro", (str(HERE / "micro.py"),), 1),
        Part("published", (str(HERE / "plan_published.py"),), 1),
        comparison("demo", 1, data),
        Part("scaling", (str(HERE / "scaling.py"),), 6),
        Part("overhead", (str(HERE / "overhead.py"), "--profile", "cpu", *images), 10),
        comparison("digits", 32, data),
        comparison("charlm", 33, data),
        comparison("cifar100-small", 35, data),
    ]


def run(part: Part) -> bool:
    """Run a part, and write what a comparison has found; whether it worked."""
    began = time.monotonic()
    code = subprocess.run([sys.executable, *part.words], check=False).returncode
    if code == 130:
        sys.exit("interrupted; the same command goes on from here")
    if code:
        print(f"{part.name} failed with exit code {code}", file=sys.stderr)
        return False
    if part.name in COMPARISONS:
        keep(read_comparison(folder_of(part.name)), part.name)
    print(f"{part.name}: {(time.monotonic() - began) / 60:.0f} minutes", flush=True)
    return True


def keep(found: Comparison, name: str) -> None:
    """Write what the docs show of a comparison: its numbers and, but for the demo, its pictures."""
    write_json(HERE / "results" / f"compare-{name}.json", digest(found, name))
    if name == "demo":
        return
    metadata: Any = {"Date": None}
    with look():
        for kind, picture in {"steps": scaling(found), "curves": curves(found, found.batches[-1])}.items():
            if picture is not None:
                sheet(picture).savefig(HERE.parent / "docs" / f"compare-{name}-{kind}.svg", metadata=metadata)


def digest(found: Comparison, name: str) -> dict[str, object]:
    """A comparison as the docs show it: tables, who wins, what was chosen, how every seed ended."""
    machine = {**found.machine, "command": command_of(found, name)}
    sizes = []
    for batch in reversed(found.batches):
        budgets = " and ".join(str(steps) for steps in dict.fromkeys(line.steps for line in found.at(batch)))
        goal = f"; goal {found.text(found.goal(batch))}" if found.at(batch, kind="first-order") else ""
        title = f"Batch {batch} ({found.samples(batch)} samples), {budgets} steps{goal}:"
        sizes.append({"batch": batch, "title": title, "rows": [row.cells() for row in rows(found, batch)]})
    wins = []
    for verdict in verdicts(found):
        best = [" ".join(verdict.best.get(kind, "-")).strip() for kind in KINDS]
        wins.append([verdict.batch, verdict.measure, *best, verdict.winner or "nobody"])
    lines = [
        {
            "optimizer": line.name,
            "batch": line.batch,
            "steps": line.steps,
            "values": line.values,
            "at_edge": line.at_edge,
            "seeds": {run.seed: run.points[-1][found.column] if run.points else None for run in line.finals},
            "reached": {str(target): finite(found.reach(line, target)[0]) for target in found.targets},
        }
        for line in found.lines
    ]
    return {
        "about": found.about,
        "machine": machine,
        "profile": found.plan["profile"],
        "head": headings(found),
        "batches": sizes,
        "wins": wins,
        "findings": findings(found),
        "lines": lines,
    }


def command_of(found: Comparison, name: str) -> str:
    """What makes a comparison again, without anybody's paths."""
    if name in COMPARISONS:
        return f"natgrad compare {' '.join(COMPARISONS[name])}"
    return re.sub(r" --(out|workers) \S+| --reuse", "", found.machine["command"])


def finite(value: float) -> float | None:
    return value if value < float("inf") else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None, help="folder of CIFAR-100's parquet files (hub: uoft-cs/cifar100)")
    parser.add_argument("--only", nargs="+", default=[], help="names of parts")
    parser.add_argument("--plan", action="store_true", help="print the parts and run nothing")
    parser.add_argument(
        "--keep", nargs=2, metavar=("FOLDER", "NAME"), help="write what a finished comparison has found"
    )
    told = parser.parse_args()
    if told.keep:
        keep(read_comparison(Path(told.keep[0])), told.keep[1])
        subprocess.run([sys.executable, str(HERE / "tables.py")], check=True)
        return
    listed = parts(told.data or None)
    if unknown := set(told.only) - {part.name for part in listed}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; choose {', '.join(part.name for part in listed)}")
    chosen = [part for part in listed if not told.only or part.name in told.only]
    able = [part for part in chosen if told.data or not part.images]
    for part in chosen:
        why = "" if part in able else ", left out: it needs --data, a folder of CIFAR-100's parquet files"
        print(f"{part.name:16}about {part.minutes:3} minutes{why}")
    print(f"{'all':16}about {sum(part.minutes for part in able):3} minutes on two cores", flush=True)
    if told.plan:
        return
    worked = [run(part) for part in able]
    subprocess.run([sys.executable, str(HERE / "tables.py")], check=False)
    sys.exit(0 if all(worked) else 1)


if __name__ == "__main__":
    main()
