"""A campaign of faults: what becomes of a run that is killed, stopped, starved of disk or memory, or fed bad files.

    python benchmarks/faults.py            (some 120 faults, half an hour on one core; it goes on where it was stopped)
    python benchmarks/faults.py --only "kill one rank" --times 20 --out /dev/null
    python benchmarks/faults.py --show

Every fault is drawn: a kind (faults_kinds.py), an optimizer, 1, 2 or 4 ranks, and who trains, natgrad's trainer or a
user's loop under DistributedDataParallel or fully_shard. The run must end with the weights of the undisturbed run to
the last bit, or with one line that names what to do. World(check=1) compares ranks after every step.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import faults_loop
import faults_recipes
import torch
from faults_kinds import KINDS, Outcome, Trial
from faults_run import Setting, loss_of, run, weights
from faults_table import faults_table
from record import Record, read

RESULTS = Path(__file__).parent / "results" / "faults.json"
Whole = dict[Setting, tuple[dict[str, torch.Tensor], float | None]]


def drawn(seed: int, times: int | None = None, only: str | None = None) -> list[dict[str, Any]]:
    """The campaign's faults, in an order in which all kinds come early."""
    draw, found = Random(seed), list[tuple[float, dict[str, Any]]]()
    for name, kind in KINDS.items():
        if only not in (None, name):
            continue
        count = times if only is not None and times is not None else kind.weight
        for k in range(count):
            how = draw.choice(kind.hows)
            known = faults_recipes.RECIPES if how == "plain" else faults_loop.OPTIMIZERS
            ranks = draw.choice([n for n in kind.ranks if n > 1 or how in ("plain", "loop")])
            fault = {"kind": name, "optimizer": draw.choice([*known]), "ranks": ranks, "how": how}
            found.append(((k + draw.random()) / count, {**fault, "seed": draw.randrange(10**6)}))
    return [fault for _, fault in sorted(found, key=lambda entry: entry[0])]


SHORT = [
    ("kill one rank", "spngd", 2, "plain", 1),
    ("kill in mid-checkpoint", "nlcg", 2, "sharded", 2),
    ("kill all ranks", "seng", 2, "ddp", 3),
    ("file size limit", "spngd", 1, "plain", 4),
    ("flipped bit", "budget", 1, "plain", 5),
    ("hostile checkpoint", "adamw", 1, "plain", 6),
    ("out of memory", "kfac", 1, "loop", 7),
]
"""A handful of faults for the tests."""


def undisturbed(setting: Setting, folder: Path, known: Whole) -> tuple[dict[str, torch.Tensor], float | None]:
    """The weights of a run to which nothing happens, and the trainer's loss on the test."""
    if setting not in known:
        out = folder / "whole"
        ended = run(setting, out)
        found = weights(out)
        if found is None:
            raise SystemExit(f"an undisturbed run of {setting} has failed: {ended[0].said[-3000:]}")
        known[setting] = found, loss_of(out) if setting.how == "plain" else None
        shutil.rmtree(out)
    return known[setting]


def suffer(fault: dict[str, Any], known: Whole) -> dict[str, Any]:
    """Make one fault happen; return what came of it."""
    setting = Setting(fault["optimizer"], fault["ranks"], fault["how"])
    folder = Path(tempfile.mkdtemp(prefix="natgrad-faults-"))
    try:
        trial = Trial(setting, Random(fault["seed"]), folder, *undisturbed(setting, folder, known))
        began = time.monotonic()
        try:
            outcome = KINDS[fault["kind"]].do(trial)
        except PermissionError as error:
            outcome = Outcome(True, f"skipped: {error}")
        told = {"right": outcome.right, "ended": outcome.how, "hung": trial.hung, "drawn": trial.told}
        said = outcome.said.replace(str(folder), "").strip()
        return {**told, "said": said, "seconds": round(time.monotonic() - began, 1)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[*KINDS], help="one kind of fault")
    parser.add_argument("--short", action="store_true", help="a handful of faults, in half a minute")
    parser.add_argument("--times", type=int, help="with --only: how many")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print the table of the results")
    given = parser.parse_args()
    if given.show:
        print(faults_table(read(given.out)))
        return 0
    record = Record(given.out, "cpu", outcomes=True, seed=given.seed)
    record.content["cases"] = [c for c in record.content["cases"] if c["rows"][0]["right"]]  # the others are mended
    known: Whole = {}
    faults = drawn(given.seed, given.times, given.only)
    if given.short:
        faults = [dict(zip(("kind", "optimizer", "ranks", "how", "seed"), fault)) for fault in SHORT]
    for number, fault in enumerate(faults):
        if record.find(fault) is not None:
            continue
        row = suffer(fault, known)
        record.add(fault, [row])
        mark = "" if row["right"] else "WRONG "
        words = f"{fault['kind']}, {fault['optimizer']}, {fault['ranks']}, {fault['how']}"
        print(f"{number + 1:>3}/{len(faults)}  {mark}{words}: {row['ended']} ({row['seconds']} s)  {row['said'][:200]}")
        sys.stdout.flush()
    print(faults_table(record.content))
    return 0 if all(case["rows"][0]["right"] for case in record.content["cases"]) else 1


if __name__ == "__main__":
    sys.exit(main())
