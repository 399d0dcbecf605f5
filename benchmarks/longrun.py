"""Does measuring less cost accuracy? SP-NGD by default, against every step, against every step and every row.

    python benchmarks/longrun.py --data data/cifar100      both tasks; about 20 minutes on one core
    python benchmarks/longrun.py --show                    the tables of the committed results

Same damping for all; the learning rate of each is chosen from the same few by validation loss over all steps. Then
five fresh seeds, the three taking turns, judged on the test images. Digits train for 200 steps instead of 24.
"""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

from grid import Contender
from study import Study, main, merit

from natgrad_lab.train.optimizers import SpNgd

EARLY, FRESH = 100, (1, 2, 3, 4, 5)  # seeds
STEPS = {"digits": 200, "cifar100-small": 80}
RATES = {"digits": (0.003, 0.01, 0.03, 0.1), "cifar100-small": (0.03, 0.1, 0.3)}
BASE = SpNgd()
KEPT = ("accuracy", "loss", "train_loss", "step_ms", "mean_step_ms", "refreshed")


def contenders(task: str) -> list[Contender]:
    """The default, and two that measure more."""
    space = {"lr": RATES[task]}
    return [
        Contender("default", BASE, space),
        Contender("every step", replace(BASE, refresh=1), space),
        Contender("every step, every row", replace(BASE, refresh=1, rows_per_dim=None), space),
    ]


def run(study: Study) -> dict[str, Any]:
    """Choose each learning rate, then run all with fresh seeds."""
    steps = STEPS[study.task.name]
    found = [{"name": one.name, "finals": [], **choose(study, one, steps)} for one in contenders(study.task.name)]
    for seed in FRESH:
        for one, contender in zip(found, contenders(study.task.name)):
            one["finals"].append(tried(study, contender, one["chosen"], seed, "test", steps))
    return {"steps": steps, "damping": BASE.damping, "length": BASE.length, "contenders": found}


def choose(study: Study, contender: Contender, steps: int) -> dict[str, Any]:
    """The learning rate with the lowest validation loss, and all that was tried."""
    trials = [tried(study, contender, {"lr": lr}, EARLY, "validation", steps) for lr in contender.space["lr"]]
    chosen = min(trials, key=merit)["values"]
    return {"chosen": chosen, "at_edge": contender.edges(chosen), "tuning": trials}


def tried(study: Study, contender: Contender, values: dict, seed: int, judged_on: str, steps: int) -> dict[str, Any]:
    """One trial as the results keep it."""
    result = study.trial(contender.settings(values), seed, judged_on, steps)
    return {"values": values, "seed": seed, **{name: result[name] for name in KEPT}}


def table(result: dict[str, Any]) -> str:
    """Accuracy, what it cost, and the difference to the default over the same seeds."""
    given = f"damping {result['damping']:g}, length {result['length']}"
    lines = [
        f"{result['steps']} steps, {given}, seeds {' '.join(map(str, seeds(result)))}",
        "",
        "| statistics | lr | test accuracy: mean (range) | minus default, points | last train loss | median ms a step "
        "| mean ms a step | refreshed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    base = column(result["contenders"][0], "accuracy")
    for one in result["contenders"]:
        accuracy, loss = column(one, "accuracy"), column(one, "train_loss")
        spread = f"{fmean(accuracy):.4f} ({min(accuracy):.4f} to {max(accuracy):.4f})"
        losses = f"{fmean(loss):.2g} ({min(loss):.2g} to {max(loss):.2g})"
        times = " | ".join(f"{fmean(column(one, name)):.0f}" for name in ("step_ms", "mean_step_ms"))
        refreshed = fmean(column(one, "refreshed"))
        rate = f"{one['chosen']['lr']:g}" + (" (end of range)" if one["at_edge"] else "")
        difference = apart(accuracy, base)
        lines.append(f"| {one['name']} | {rate} | {spread} | {difference} | {losses} | {times} | {refreshed:.0%} |")
    return "\n".join(lines)


def seeds(result: dict[str, Any]) -> list[int]:
    return [trial["seed"] for trial in result["contenders"][0]["finals"]]


def column(one: dict[str, Any], name: str) -> list[float]:
    """One value of all final runs; a loss that was no number counts as one."""
    return [math.nan if trial[name] is None else trial[name] for trial in one["finals"]]


def apart(accuracy: list[float], base: list[float]) -> str:
    """The mean difference in points and its standard error, seed by seed: the same seed starts at the same weights."""
    differences = [100 * (mine - its) for mine, its in zip(accuracy, base)]
    if not any(differences):
        return "0"
    return f"{fmean(differences):+.2f} ± {stdev(differences) / math.sqrt(len(differences)):.2f}"


if __name__ == "__main__":
    main("longrun", __doc__, run, table)
