"""Writes the tables of benchmarks/results into the docs, between their marks.

    python benchmarks/tables.py           (rewrite)
    python benchmarks/tables.py --check   (say which pages are not as the results are; exit code 1)

A mark is a comment `<!-- table NAME -->`, and the table ends at `<!-- end -->`. NAME is a file of results without
.json; `compare-TASK` may be followed by a size of batch, or by `wins`. `largest` has all comparisons' largest batches,
`arguments` the optimizers' arguments, `arguments parts` those of the objects that they take.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arguments
import budget
import defaults
import faults_table
import gpu_results
import host
import memory
import safety
import sharded

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"(<!-- table ([\w.-]+)(?: ([\w.-]+))? -->\n).*?(<!-- end -->)", re.DOTALL)
Rows = list[list[str]]


def table(head: list[str], rows: Rows) -> str:
    """A table in Markdown, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compared(results: dict[str, Any], which: str | None) -> str:
    """The tables of a comparison: those of all sizes of batch, of one, or who wins."""
    if which == "wins":
        head = ["batch", "by", *("first-order", "Muon, Shampoo, SOAP", "natgrad"), "ahead"]
        return table(head, results["wins"])
    sizes = [one for one in results["batches"] if which in (None, one["batch"])]
    if not sizes:
        raise ValueError(f"no batch {which} in the results; there are {[one['batch'] for one in results['batches']]}")
    return "\n\n".join(f"{one['title']}\n\n{table(results['head'], one['rows'])}" for one in sizes)


def scaling(results: dict[str, Any], which: str | None) -> str:
    """Time, memory and traffic by ranks."""
    head = [
        "optimizer",
        "ranks",
        "ms a step, median",
        "mean",
        "state, MiB a rank",
        "KB sent a step: gradients",
        "statistics",
        "weights",
    ]
    rows = []
    for case in results["cases"]:
        row = case["rows"][0]
        state = "-".join(f"{mib:g}" for mib in dict.fromkeys(row["state_mib"]))
        sent = [f"{row['sent_kb'].get(kind, 0):g}" for kind in ("gradients", "statistics", "weights")]
        rows.append(
            [case["optimizer"], str(case["ranks"]), f"{row['median_ms']:g}", f"{row['mean_ms']:g}", state, *sent]
        )
    return table(head, rows)


def micro(results: dict[str, Any], which: str | None) -> str:
    """Medians of the parts of a refresh."""
    rows = [[one["name"], f"{one['median_ms']:g}", f"{one['iqr_ms']:g}"] for one in results["cases"][0]["rows"]]
    return table(["part", "median, ms", "between the quartiles, ms"], rows)


def overhead(results: dict[str, Any], which: str | None) -> str:
    """What a step costs beside SGD's, by case."""
    parts = []
    for case in results["cases"]:
        shape = f"channels {'last' if case['channels_last'] else 'first'}, {case['images']}"
        title = f"ResNet-{case['depth']}, batch {case['batch']}, {case['device']}, {case['threads']} thread(s), {shape}"
        rows = []
        for row in case["rows"]:
            numbers = [f"{row[name]:.1f}" for name in ("wall", "within")]
            numbers += [f"{row[name]:.3f}" for name in ("inside", "whole", "whole_cpu")]
            check = f"{row['check']:.1%}" if row.get("check") else ""
            measured = "" if row.get("measured") is None else f"{row['measured']:.1%}"
            state = "" if row.get("state") is None else f"{row['state'] / 2**20:.1f}"
            rows.append([row["name"], *numbers, check, measured, state])
        ratios = ["1 + inside / SGD", "whole", "whole, CPU"]
        head = ["", "ms", "inside, ms", *ratios, "checksums", "measured a step", "state, MiB"]
        parts.append(f"{title}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def settings(results: dict[str, Any], which: str | None) -> str:
    """What every choice of settings reaches on every task."""
    return defaults.table(results)


def on_host(results: dict[str, Any], which: str | None) -> str:
    """Operations, waits and milliseconds of a step by network."""
    return host.table(results).strip()


def on_gpu(results: dict[str, Any], which: str | None) -> str:
    """Checks, steps, traces and training of one GPU."""
    return gpu_results.table(results)


def under_a_budget(results: dict[str, Any], which: str | None) -> str:
    """The longest and the mean step under every rule of refresh, by task."""
    return budget.table(results).strip()


def held(results: dict[str, Any], which: str | None) -> str:
    """What optimizers keep, by network and ranks."""
    return memory.table(results).strip()


def in_parts(results: dict[str, Any], which: str | None) -> str:
    """What the fullest rank of a sharded model holds, beside AdamW's."""
    return sharded.table(results).strip()


def to_target(results: dict[str, Any], which: str | None) -> str:
    """Steps to the target by the size of a batch, and critical batch sizes."""
    import critical

    return critical.table(results["rows"])


def of_bad_numbers(results: dict[str, Any], which: str | None) -> str:
    """What becomes of each thing that goes wrong, by optimizer."""
    names = list(dict.fromkeys(name for case in results["cases"] for name in case["rows"][0]))
    rows = []
    for case in results["cases"]:
        told = case["rows"][0]
        alike = set(told.values()) if len(told) > 1 else set()
        if len(alike) == 1 and len(told) >= 4:
            rows.append([case["case"], f"all: {alike.pop()}"])
        else:
            by = [(text, [name for name in names if told.get(name) == text]) for text in dict.fromkeys(told.values())]
            rows.append([case["case"], "; ".join(f"{' and '.join(own)}: {text}" for text, own in by)])
    lines = [["what goes wrong", "what happens"], ["---", "---"], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def of_fuzz(results: dict[str, Any], which: str | None) -> str:
    """How many programs were compared, and how far they were from the reference at most."""
    told = results["cases"][0]["rows"][0]
    kinds = ("SPNGD", "KFAC", "SENG", "NLCG", "2 ranks", "3 ranks", "frozen", "resumed", "scaled", "TiedHead", "Again")
    rows = [["programs", f"{told['programs']:,}, {told['unlike']:,} of them unlike each other"]]
    rows += [["among them", ", ".join(f"{kind} {told['counted'].get(kind, 0)}" for kind in kinds)]]
    rows += [["that differ from the reference", str(len(told["failures"]))]]
    worst = f"{told['worst']['float64']:.1g} of the way that the weights have gone"
    rows += [["largest difference in double precision", worst]]
    lines = [["", f"torch {results['torch']}"], ["---", "---"], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def of_soak(results: dict[str, Any], which: str | None) -> str:
    """The long runs: what a step takes and what is held, and by how much that rises over the second half."""
    head = ["optimizer", "steps", "ms a step", "rise", "memory, MiB", "rise", "tensors", "rise", "hooks", "skipped"]
    rows = []
    for case in results["cases"]:
        row = case["rows"][0]
        if case["case"] != "long run":
            continue
        last, half = row["looks"][-1], row["looks"][len(row["looks"]) // 2 :]
        rises = {key: f"{told['rise']:+.2g} ± {told['error']:.1g}" for key, told in row["rises"].items()}
        ms = sum(one["ms"] for one in half) / len(half)
        cells = [f"{last['step']:,}", f"{ms:.2f}", rises["ms"], f"{last['rss_mib']:.0f}", rises["rss_mib"]]
        cells += [str(last["tensors"]), rises["tensors"], str(last["hooks"]), str(row["skipped"])]
        rows.append([case["optimizer"], *cells])
    return table(head, rows)


def disturbed(results: dict[str, Any], which: str | None) -> str:
    """What has become of runs by fault; or of those on two hosts."""
    return faults_table.hosts_table(results) if which == "hosts" else faults_table.faults_table(results)


TRAINERS = {"lightning": "Lightning", "accelerate": "Accelerate", "transformers": "Hugging Face Trainer"}


def of_trainers(results: dict[str, Any], which: str | None) -> str:
    """What came of each trainer's runs, beside a hand-written loop."""
    runs = results["equal to the loop"]
    ways = list(next(iter(runs.values())))
    rows = [
        [TRAINERS[name], ranks, *(both[ranks] for both in by_way.values())]
        for name, by_way in runs.items()
        for ranks in next(iter(by_way.values()))
    ]
    lines = [["trainer", "ranks", *ways], ["---"] * (len(ways) + 2), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


KINDS: dict[str, Callable[[dict[str, Any], str | None], str]] = {
    "critical": to_target,
    "compare": compared,
    "scaling": scaling,
    "micro": micro,
    "overhead": overhead,
    "defaults": settings,
    "host": on_host,
    "gpu": on_gpu,
    "budget": under_a_budget,
    "memory": held,
    "sharded": in_parts,
    "bad_numbers": of_bad_numbers,
    "fuzz": of_fuzz,
    "safety": lambda results, which: safety.table(results),
    "soak": of_soak,
    "faults": disturbed,
    "trainers": of_trainers,
}


def largest(results: Path) -> str:
    """Who wins at the largest batch of each comparison that has been made."""
    rows = []
    for path in sorted(results.glob("compare-*.json"), key=lambda path: "digits" in path.stem):
        if path.stem == "compare-demo":
            continue
        told = json.loads(path.read_text())
        batch = told["wins"][-1][0]
        end = next(row for row in told["wins"] if row[0] == batch)
        if "-" in end[2:5]:
            continue  # where a kind did not take part, the kinds are not compared
        goal = told["batches"][0]["title"].partition("goal ")[2].rstrip(":")
        task = f"{path.stem.removeprefix('compare-')}, {batch}: {goal}"
        rows += [[task, *row[1:]] for row in told["wins"] if row[0] == batch]
    head = ["task, batch: goal", "by", "first-order", "Muon, Shampoo, SOAP", "natgrad", "ahead"]
    return table(head, rows)


def made(name: str, which: str | None, results: Path = RESULTS) -> str:
    """The table of a mark; a line that says what to run where there are no results yet."""
    if name == "largest":
        return largest(results)
    if name == "arguments":
        return arguments.made(which)
    path = results / f"{name}.json"
    if not path.exists() and name.startswith("gpu"):
        return f"*Not run yet on a GPU: `python benchmarks/gpu.py` writes `benchmarks/results/{name}.json`.*"
    if not path.exists():
        return f"*Not measured yet: `make bench` writes `benchmarks/results/{name}.json`.*"
    told = json.loads(path.read_text())
    return KINDS[name.split("-")[0]](told, which)


def filled(text: str, results: Path = RESULTS) -> str:
    """A page with all its tables."""
    return MARK.sub(lambda mark: f"{mark[1]}\n{made(mark[2], mark[3], results)}\n\n{mark[4]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a page is out of date")
    check, stale = parser.parse_args().check, []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        before = page.read_text()
        after = filled(before)
        if before != after:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(after)
    print("out of date: " + ", ".join(stale) if check and stale else f"written: {', '.join(stale) or 'nothing new'}")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
