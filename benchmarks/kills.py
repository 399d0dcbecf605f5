"""Does a killed run end as if nothing had happened? Kill it at random moments and compare its last weights bit by bit.

    .venv/bin/python benchmarks/kills.py --times 10 --out benchmarks/results/kills.json

One undisturbed run, then so many that are killed by SIGKILL at a random moment of their training: in turns one rank,
which the launcher then restarts with the others from the last checkpoint (--max-restarts), and the launcher, with which
its ranks end, so that `--resume` takes the run up. Checkpoints are written at every other step: many lie in one.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import Record

RUN = (
    *("digits_spngd", "--epochs", "20", "--save-every", "2", "--optimizer.refresh", "None", "--average", "0.9"),
    *("--regularisation.mixup", "0.4", "--regularisation.erase", "0.5", "--micro-batch", "100"),
)


def command(out: Path, ranks: int, *more: str) -> list[str]:
    return [sys.executable, "-m", "natgrad_lab", "train", *RUN, "--ranks", str(ranks), "--out", str(out), *more]


def start(words: list[str]) -> subprocess.Popen[bytes]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, env=env)


def steps_done(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b'"kind": "step"') if path.exists() else 0


def ranks_of(launcher: int) -> list[int]:
    """The processes that a launcher has started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError, ValueError):
                continue
            if parent == launcher:
                found.append(int(entry.name))
    return sorted(found)


def kill(process: subprocess.Popen[bytes], out: Path, moment: float, span: float, everything: bool) -> int:
    """Wait for the first step, then for a share of the training's seconds, and kill; return the steps that were
    done.
    """
    while steps_done(out) == 0:
        if process.poll() is not None:
            raise SystemExit(f"the run ended before its first step: {process.stderr.read().decode()}")  # type: ignore[union-attr]
        time.sleep(0.02)
    time.sleep(moment * span)
    done = steps_done(out)
    if everything:
        os.kill(process.pid, signal.SIGKILL)
    else:
        victims = ranks_of(process.pid)
        if victims:
            os.kill(random.Random(done).choice(victims), signal.SIGKILL)
    return done


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "model.pt", weights_only=True)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def finished(process: subprocess.Popen[bytes]) -> None:
    _, said = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"exit code {process.returncode}: {said.decode()}")


def trial(folder: Path, ranks: int, number: int, moment: float, span: float, whole: dict[str, Any]) -> dict[str, Any]:
    out, everything = folder / f"killed-{number}", number % 2 == 1
    process = start(command(out, ranks, *(() if everything else ("--max-restarts", "2"))))
    done = kill(process, out, moment, span, everything)
    if everything:
        process.wait()
        while subprocess.run(["pgrep", "-f", str(out)], capture_output=True, check=False).returncode == 0:
            time.sleep(0.05)  # the kernel is ending its ranks
        there = (out / "checkpoints").is_dir() and any(p.suffix == "" for p in (out / "checkpoints").glob("step-*"))
        process = start(command(out, ranks, "--resume" if there else "--auto-resume"))
    finished(process)
    equal = same(weights(out), whole)
    print(f"{number:>3}  killed {'all' if everything else 'one'} after step {done:>3}  equal: {equal}", flush=True)
    return {"killed": "all" if everything else "one", "after_step": done, "equal": equal}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        undisturbed = folder / "undisturbed"
        process = start(command(undisturbed, given.ranks))
        while steps_done(undisturbed) == 0 and process.poll() is None:
            time.sleep(0.02)
        began = time.perf_counter()
        finished(process)
        span, whole = time.perf_counter() - began, weights(undisturbed)
        print(f"undisturbed: {steps_done(undisturbed)} steps in {span:.1f} s on {given.ranks} ranks", flush=True)
        draw = random.Random(given.seed)
        trials = [trial(folder, given.ranks, k, draw.random() * 0.8, span, whole) for k in range(given.times)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if given.out:
        Record(given.out, "cpu").add({"run": " ".join(RUN), "ranks": given.ranks, "seed": given.seed}, trials)
    return 0 if all(one["equal"] for one in trials) else 1


if __name__ == "__main__":
    sys.exit(main())
