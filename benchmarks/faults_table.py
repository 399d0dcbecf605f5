"""The tables of the fault campaign: faults by kind, and two hosts that lose each other."""

from __future__ import annotations

from typing import Any

NAMES = {"plain": "the trainer", "loop": "a plain loop", "ddp": "DDP", "sharded": "fully_shard"}


def faults_table(content: dict[str, Any]) -> str:
    """Faults by kind: how many there were, how they ended, and how many not as they should."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for case in content["cases"]:
        if "kind" in case:
            kinds.setdefault(case["kind"], []).append({**case, **case["rows"][0]})
    lines = [
        "| fault | times | optimizers | ranks | trained by | equal to the last bit | close | one line | hung | wrong |",
        "| --- | ---: | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    everything = [row for rows in kinds.values() for row in rows]
    for name, rows in [*kinds.items(), ("in all", everything)]:
        ended = [sum(row["ended"] == how and row["right"] for row in rows) for how in ("equal", "close", "line")]
        hung, wrong = sum(row["hung"] for row in rows), sum(not row["right"] for row in rows)
        ranks = ", ".join(map(str, sorted({row["ranks"] for row in rows})))
        hows = ", ".join(NAMES[how] for how in NAMES if any(row["how"] == how for row in rows))
        optimizers = len({row["optimizer"] for row in rows})
        skipped = sum(row["ended"].startswith("skipped") for row in rows)
        times = f"{len(rows)} ({skipped} skipped)" if skipped else str(len(rows))
        lines.append(f"| {' | '.join([name, times, str(optimizers), ranks, hows, *map(str, [*ended, hung, wrong])])} |")
    return "\n".join(lines)


def hosts_table(content: dict[str, Any]) -> str:
    """What became of every case."""
    lines = ["| two hosts | ended | seconds | said |", "| --- | --- | ---: | --- |"]
    for case in content["cases"]:
        if "hosts" in case:
            row = case["rows"][0]
            ended = row["ended"] if row["right"] else f"**{row['ended']}**"
            said = row["said"].splitlines()[0] if row["said"] else ""
            lines.append(f"| {case['hosts']} | {ended} | {row['seconds']:g} | {said.partition(': start all')[0]} |")
    return "\n".join(lines)
