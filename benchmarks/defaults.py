"""Which settings are good for everybody? Choices of SP-NGD and K-FAC, nothing else tuned, on small and large batches.

    python benchmarks/defaults.py --data data/cifar100   (25 minutes on two cores; stopped, it goes on where it was)
    python benchmarks/defaults.py --show                 (the tables of the committed results)

A user gives a learning rate and nothing else. So every choice runs at a few learning rates on the tasks of the
comparison, with a cosine and one seed, and is judged by accuracy on held-out samples (of characters too). What counts
is how far it is behind the best of all on each task, at one learning rate for all tasks.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import as_completed
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from record import Record

from natgrad.train.compare.contenders import Contender
from natgrad.train.compare.space import Choice
from natgrad.train.compare.tasks import Batch, find_task
from natgrad.train.compare.trials import Trial, remember, remembered
from natgrad.train.compare.work import Workers
from natgrad.train.optimizers import KFac, Settings, SpNgd

SEED = 100
CASES: tuple[tuple[str, Batch], ...] = (
    ("digits", 64),
    ("digits", "full"),
    ("charlm", 512),
    ("cifar100-small", 125),
    ("cifar100-small", "full"),
)
RATES = (0.03, 0.1)
CHOICES: dict[str, Settings] = {
    "SP-NGD": SpNgd(),
    "momentum 0.9": SpNgd(momentum=0.9),
    "momentum 0.5": SpNgd(momentum=0.5),
    "momentum before preconditioning": SpNgd(before=True),
    "change of 0.01, whatever the batch": SpNgd(largest_change=0.01),
    "change of 0.1, whatever the batch": SpNgd(largest_change=0.1),
    "plain length": SpNgd(length="plain"),
    "trust ratio": SpNgd(length="trust"),
    "rescaled": SpNgd(rescale="always"),
    "damping 3e-4": SpNgd(damping=3e-4),
    "damping 3e-3": SpNgd(damping=3e-3),
    "every step": SpNgd(refresh=1),
    "K-FAC": KFac(),
    "K-FAC, every 10 steps, decay 0.95": KFac(refresh=10, decay=0.95),
    "K-FAC, every step, decay 0.95": KFac(refresh=1, decay=0.95),
    "K-FAC, norms unit-wise": KFac(norms="unitwise"),
}
"""The first is SPNGD's default, of which those below say what is different; then KFAC's."""


def steps_of(task: str, batch: Batch) -> int:
    return find_task(task).steps_of(batch)


def title(task: str, batch: Batch) -> str:
    return f"{task}, {batch}"


def trials(task: str, batch: Batch, steps: int) -> list[Trial]:
    """Every choice at every learning rate."""
    found = []
    for name, settings in CHOICES.items():
        contender = Contender(name, "natgrad", settings, {"lr": Choice(RATES)})
        for rate in RATES:
            values = {"lr": rate, "schedule": "cosine", "warm_up": 0.0}
            found.append(Trial(contender, values, batch, steps, SEED, final=False))
    return found


def make(task_name: str, batch: Batch, data: str, folder: Path, workers: int) -> list[dict[str, Any]]:
    """The rows of one case: what every choice reached at every learning rate."""
    task = find_task(task_name)
    task = task.located(data) if task_name.startswith("cifar") else task
    wanted = trials(task_name, batch, steps_of(task_name, batch))
    known = {trial.file(task, folder): remembered(trial.file(task, folder), reuse=False) for trial in wanted}
    maker = Workers(task, "cpu", workers)
    try:
        asked = {maker.submit(trial): trial for trial in wanted if known[trial.file(task, folder)] is None}
        for future in as_completed(asked):
            path = asked[future].file(task, folder)
            known[path] = future.result()
            remember(path, known[path])
            print(f"{title(task_name, batch)}: {asked[future].title()}", flush=True)
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
    """Accuracy by choice and case at each learning rate, and how far behind; the least behind on the mean first."""
    cases = content["cases"]
    head = ["choice", *(case["case"] for case in cases), "mean behind, at lr", "worst"]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---', *['---:'] * (len(head) - 1)])} |"]
    far, rows = behind(cases), []
    for choice in dict.fromkeys(name for name, _ in far):
        rates = [rate for name, rate in far if name == choice]
        means = {rate: round(fmean(far[choice, rate]), 1) for rate in rates}
        least = min(means.values())
        best = [rate for rate in rates if means[rate] == least]
        cells = []
        for case in cases:
            reached = {one["lr"]: one["accuracy"] for one in case["rows"] if one["choice"] == choice}
            cells.append(" / ".join(f"{100 * reached[rate]:.1f}" for rate in rates))
        at = " or ".join(f"{rate:g}" for rate in best)
        worst = ", ".join(f"{max(far[choice, rate]):.1f}" for rate in best)
        rows.append((least, [choice, *cells, f"{least:.1f}, {at}", worst]))
    return "\n".join(lines + [f"| {' | '.join(cells)} |" for _, cells in sorted(rows, key=lambda row: row[0])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/cifar100", help="folder of CIFAR-100's parquet files")
    parser.add_argument("--workers", type=int, default=2, help="trials at a time, one thread each")
    parser.add_argument("--trials", type=Path, default=Path("runs/defaults"), help="where single trials are remembered")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "defaults.json")
    parser.add_argument("--show", action="store_true", help="print the table of the results")
    told = parser.parse_args()
    if not told.show:
        record = Record(told.out, "cpu")
        for task, batch in CASES:
            case = {
                "case": title(task, batch),
                "steps": steps_of(task, batch),
                "seed": SEED,
                "choices": {name: asdict(settings) for name, settings in CHOICES.items()},
                "rates": list(RATES),
            }
            if record.find(case) is None:
                record.add(case, make(task, batch, told.data, told.trials / title(task, batch), told.workers))
    print(table(json.loads(told.out.read_text())))


if __name__ == "__main__":
    main()
