"""Which settings are good for everybody? Choices of SP-NGD and K-FAC, nothing else tuned, on small and large batches.

    python benchmarks/defaults.py --data data/cifar100              (25 minutes on two cores)
    python benchmarks/defaults.py --data data/cifar100 --contested  (30 minutes: what was close, with fresh seeds)
    python benchmarks/defaults.py --show                            (the tables of the committed results)

Stopped, it goes on where it was.

A user gives a learning rate and nothing else. So every choice runs at a few learning rates on the tasks of the
comparison, with a cosine and one seed, and is judged by accuracy on held-out samples (of characters too). What counts
is how far it is behind the best of all on each task, at one learning rate for all tasks. Choices that were close, and
their combinations, run again with seeds that had no part in naming them.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import as_completed
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from record import Record

from natgrad_lab.compare.contenders import Contender
from natgrad_lab.compare.space import Choice
from natgrad_lab.compare.tasks import Batch, find_task
from natgrad_lab.compare.trials import Trial, remember, remembered
from natgrad_lab.compare.workers import Workers
from natgrad_lab.train.optimizers import KFac, Settings, SpNgd

SEEDS = (100,)
FRESH = (101, 102)
CASES: tuple[tuple[str, Batch], ...] = (
    ("digits", 64),
    ("digits", "full"),
    ("charlm", 512),
    ("cifar100-small", 125),
    ("cifar100-small", "full"),
)
RATES = (0.1, 0.3)
SPNGD, KFAC = SpNgd(), KFac()
CHOICES: dict[str, Settings] = {
    "SP-NGD": SPNGD,
    "momentum 0.9": replace(SPNGD, momentum=0.9),
    "momentum 0.5": replace(SPNGD, momentum=0.5),
    "momentum before preconditioning": replace(SPNGD, before=True),
    "change of 0.1": replace(SPNGD, largest_change=0.1),
    "change of 0.5": replace(SPNGD, largest_change=0.5),
    "predicted change of 0.01": replace(SPNGD, length="kl_clip"),
    "plain length": replace(SPNGD, length="plain"),
    "trust ratio": replace(SPNGD, length="trust"),
    "rescaled": replace(SPNGD, rescale="always"),
    "damping 1e-3": replace(SPNGD, damping=1e-3),
    "damping 1e-4": replace(SPNGD, damping=1e-4),
    "every step": replace(SPNGD, refresh=1),
    "half of the old average": replace(SPNGD, ema_decay=0.5),
    "K-FAC": KFAC,
    "K-FAC, no average": replace(KFAC, ema_decay=0.0),
    "K-FAC, every 10 steps, decay 0.95": replace(KFAC, refresh=10, ema_decay=0.95),
    "K-FAC, norms unit-wise": replace(KFAC, norms="unitwise"),
}
"""The first is SPNGD as it is, of which those below say what is different; then KFAC."""

CONTESTED: dict[str, Settings] = {"SP-NGD": SPNGD, "K-FAC": KFAC}
"""What the choices above left open, with seeds that had no part in naming it."""


def steps_of(task: str, batch: Batch) -> int:
    return find_task(task).steps_of(batch)


def title(task: str, batch: Batch) -> str:
    return f"{task}, {batch}"


def trials(choices: dict[str, Settings], task: str, batch: Batch, seed: int) -> list[Trial]:
    """Every choice at every learning rate."""
    found, steps = [], steps_of(task, batch)
    for name, settings in choices.items():
        contender = Contender(name, "natgrad", settings, {"lr": Choice(RATES)})
        for rate in RATES:
            values = {"lr": rate, "schedule": "cosine", "warm_up": 0.0}
            found.append(Trial(contender, values, batch, steps, seed, final=False))
    return found


def make(wanted: list[Trial], task_name: str, data: str, folder: Path, workers: int) -> list[dict[str, Any]]:
    """The rows of one case: what every choice reached at every learning rate."""
    task = find_task(task_name)
    task = task.located(data) if task_name.startswith("cifar") else task
    known = {trial.file(task, folder): remembered(trial.file(task, folder), reuse=False) for trial in wanted}
    maker = Workers(task, "cpu", workers)
    try:
        asked = {maker.submit(trial): trial for trial in wanted if known[trial.file(task, folder)] is None}
        for future in as_completed(asked):
            path = asked[future].file(task, folder)
            known[path] = future.result()
            remember(path, known[path])
            print(f"{title(task_name, asked[future].batch)}: {asked[future].title()}", flush=True)
    finally:
        maker.close()
    return [row(trial, known[trial.file(task, folder)]) for trial in wanted]


def row(trial: Trial, result: Any) -> dict[str, Any]:
    """What is kept of a trial; accuracy 0 where it diverged."""
    end = result["evaluations"][-1] if result["evaluations"] else {"accuracy": 0.0, "loss": None}
    rate = trial.values["lr"]
    return {"choice": trial.contender.name, "lr": rate, "accuracy": end["accuracy"], "loss": end["loss"]}


def behind(cases: list[dict[str, Any]]) -> dict[tuple[str, float], list[float]]:
    """Points of accuracy that each choice at each learning rate is behind the best of its case, case by case."""
    found: dict[tuple[str, float], list[float]] = {}
    for case in cases:
        best = max(one["accuracy"] for one in case["rows"])
        for one in case["rows"]:
            found.setdefault((one["choice"], one["lr"]), []).append(100 * (best - one["accuracy"]))
    return found


def table(content: dict[str, Any]) -> str:
    """Accuracy by choice and case at each learning rate (of several seeds, the mean), and how far behind; the least
    behind on the mean first."""
    cases = content["cases"]
    titles = list(dict.fromkeys(case["case"] for case in cases))
    head = ["choice", *titles, "mean behind, at lr", "worst"]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---', *['---:'] * (len(head) - 1)])} |"]
    far, rows = behind(cases), []
    for choice in dict.fromkeys(name for name, _ in far):
        rates = [rate for name, rate in far if name == choice]
        means = {rate: round(fmean(far[choice, rate]), 1) for rate in rates}
        least = min(means.values())
        best = [rate for rate in rates if means[rate] == least]
        cells = []
        for name in titles:
            reached = [100 * fmean(accuracies(cases, name, choice, rate)) for rate in rates]
            cells.append(" / ".join(f"{one:.1f}" for one in reached))
        at = " or ".join(f"{rate:g}" for rate in best)
        worst = ", ".join(f"{max(far[choice, rate]):.1f}" for rate in best)
        rows.append((least, [choice, *cells, f"{least:.1f}, {at}", worst]))
    return "\n".join(lines + [f"| {' | '.join(cells)} |" for _, cells in sorted(rows, key=lambda row: row[0])])


def accuracies(cases: list[dict[str, Any]], name: str, choice: str, rate: float) -> list[float]:
    """What a choice reached in the cases of that title, one number for each seed."""
    rows = [row for case in cases if case["case"] == name for row in case["rows"]]
    return [row["accuracy"] for row in rows if (row["choice"], row["lr"]) == (choice, rate)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/cifar100", help="folder of CIFAR-100's parquet files")
    parser.add_argument("--workers", type=int, default=2, help="trials at a time, one thread each")
    parser.add_argument("--trials", type=Path, default=Path("runs/defaults"), help="where single trials are remembered")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--contested", action="store_true", help="the choices that were close, with fresh seeds")
    parser.add_argument("--show", action="store_true", help="print the tables of the results")
    told = parser.parse_args()
    files = {False: told.out / "defaults.json", True: told.out / "defaults-contested.json"}
    if told.show:
        print("\n\n".join(table(json.loads(path.read_text())) for path in files.values()))
        return
    choices, seeds = (CONTESTED, FRESH) if told.contested else (CHOICES, SEEDS)
    record = Record(files[told.contested], "cpu")
    for seed in seeds:
        for task, batch in CASES:
            case = {
                "case": title(task, batch),
                "steps": steps_of(task, batch),
                "seed": seed,
                "choices": {name: asdict(settings) for name, settings in choices.items()},
                "rates": list(RATES),
            }
            if record.find(case) is None:
                wanted = trials(choices, task, batch, seed)
                record.add(case, make(wanted, task, told.data, told.trials / title(task, batch), told.workers))
    print(table(json.loads(files[told.contested].read_text())))


if __name__ == "__main__":
    main()
