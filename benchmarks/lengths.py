"""How far and along which momentum should a step go? Lengths x placement of momentum, tuned alike.

    python benchmarks/lengths.py --data data/cifar100      both tasks; about 45 minutes on one core
    python benchmarks/lengths.py --show                    the tables of the committed results

Every contender has a grid of 12 points: 4 learning rates x 3 dampings (SGD: x 3 momenta, AdamW: x 3 pairs of betas).
All points train for half of the steps and are judged on validation images; the best three again for all steps with
another seed; the best of these is run with three fresh seeds and judged on the test images. Where the choice lies at
an end of its range of learning rates, dampings or limits, the range is widened by one more point, three times at most.
"""

from __future__ import annotations

import json
from statistics import fmean
from typing import Any

from contenders import contenders
from grid import Contender
from study import Study, main, merit

from natgrad.train.optimizers import SpNgd

EARLY, LATE, FRESH = 100, 101, (1, 2, 3)  # seeds
FINALISTS, WIDER = 3, 3
DAMPING = SpNgd().damping
WITHIN = 0.02  # of the best accuracy: a learning rate that will do


def run(study: Study) -> dict[str, Any]:
    """Every contender's tuning and final runs."""
    return {"contenders": [compete(study, contender) for contender in contenders(study.task.name)]}


def compete(study: Study, contender: Contender) -> dict[str, Any]:
    """Tune one contender and run its choice with fresh seeds."""
    study.say(f"== {study.task.name}: {contender.name}")
    early, late = tune(study, contender)
    chosen = min(late, key=merit)["values"]
    finals = [tried(study, contender, chosen, seed, "test", study.task.steps) for seed in FRESH]
    return {
        "name": contender.name,
        "chosen": chosen,
        "at_edge": sorted(beyond(contender, chosen, [trial["values"] for trial in early])),
        "early": early,
        "late": late,
        "finals": finals,
    }


def tune(study: Study, contender: Contender) -> tuple[list[dict], list[dict]]:
    """All points at half of the steps, the best of them at all; then points beyond the ends that were chosen."""
    half, whole = study.task.steps // 2, study.task.steps
    points = contender.points(12)
    early = [tried(study, contender, point, EARLY, "validation", half) for point in points]
    best = sorted(early, key=merit)[:FINALISTS]
    late = [tried(study, contender, trial["values"], LATE, "validation", whole) for trial in best]
    for _ in range(WIDER):
        more = beyond(contender, min(late, key=merit)["values"], [trial["values"] for trial in early])
        for point in more.values():
            early.append(tried(study, contender, point, EARLY, "validation", half))
            late.append(tried(study, contender, point, LATE, "validation", whole))
        if not more:
            break
    return early, late


def tried(study: Study, contender: Contender, values: dict, seed: int, judged_on: str, length: int) -> dict[str, Any]:
    """One trial as the results keep it."""
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    result = study.trial(contender.settings(given), seed, judged_on, length)
    return {"values": values, "seed": seed, **{name: result[name] for name in KEPT}}


KEPT = ("accuracy", "loss", "train_loss", "step_ms", "refreshed")


def beyond(contender: Contender, chosen: dict[str, Any], known: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The neighbours of a choice outside of its ranges of learning rates, dampings and limits, by name of the range."""
    found = {}
    for name in ("lr", "damping", "largest_change"):
        if name not in chosen:
            continue
        others = sorted({point[name] for point in known})
        place = others.index(chosen[name])
        factor = 3 if name == "lr" else 10
        if place in (0, len(others) - 1):
            value = chosen[name] * factor if place else chosen[name] / factor
            found[name] = {**chosen, name: float(f"{value:.3g}")}
    return found


def margin(trials: list[dict[str, Any]], name: str) -> dict[float, float]:
    """The best accuracy at each value of one setting, whatever the others are."""
    best: dict[float, float] = {}
    for trial in trials:
        if name in trial["values"]:
            value = trial["values"][name]
            best[value] = max(best.get(value, 0.0), trial["accuracy"])
    return dict(sorted(best.items()))


def width(by_rate: dict[float, float]) -> str:
    """The learning rates within WITHIN of the best accuracy, from the lowest to the highest, and their ratio."""
    best = max(by_rate.values())
    good = [rate for rate, accuracy in by_rate.items() if accuracy >= best - WITHIN - 1e-9]
    return f"{min(good):g} to {max(good):g} ({max(good) / min(good):.0f}x)"


def table(result: dict[str, Any]) -> str:
    """Two tables: what was reached, and how much the learning rate matters."""
    return f"{reached(result)}\n\n{forgiving(result)}"


def reached(result: dict[str, Any]) -> str:
    """Test accuracy and loss of each contender's choice, best first."""
    lines = [
        "| | test accuracy, seeds 1 2 3 | mean | last train loss | chosen | at an end | ms a step |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    order = sorted(result["contenders"], key=lambda one: -fmean(trial["accuracy"] for trial in one["finals"]))
    for one in order:
        finals = one["finals"]
        seeds = " ".join(f"{trial['accuracy']:.3f}" for trial in finals)
        losses = " ".join("-" if trial["train_loss"] is None else f"{trial['train_loss']:.3g}" for trial in finals)
        chosen = ", ".join(f"{name} {json.dumps(value)}" for name, value in one["chosen"].items())
        mean, took = fmean(trial["accuracy"] for trial in finals), fmean(trial["step_ms"] for trial in finals)
        ends = ", ".join(one["at_edge"]) or "-"
        lines.append(f"| {one['name']} | {seeds} | {mean:.3f} | {losses} | {chosen} | {ends} | {took:.0f} |")
    return "\n".join(lines)


def forgiving(result: dict[str, Any]) -> str:
    """How much a wrong learning rate or damping costs: validation accuracy after half of the steps.

    At each value the best over the other setting, and once more with the damping that is the default.
    """
    lines = [
        f"| | by lr | lr within 2 points | by damping (or limit) | by lr, damping {DAMPING:g} | lr within 2 points |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in result["contenders"]:
        by_rate = margin(one["early"], "lr")
        by_damping = margin(one["early"], "damping") or margin(one["early"], "largest_change")
        fixed = margin([trial for trial in one["early"] if trial["values"].get("damping") == DAMPING], "lr")
        cells = [listed(by_rate), width(by_rate), listed(by_damping), listed(fixed), width(fixed) if fixed else "-"]
        lines.append(f"| {one['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def listed(accuracies: dict[float, float]) -> str:
    return ", ".join(f"{value:g}: {accuracy:.3f}" for value, accuracy in accuracies.items()) or "-"


def together(results: list[dict[str, Any]]) -> str:
    """One setting for all tasks: the point whose accuracy falls least behind the best of anyone, on the mean."""
    best = [max(trial["accuracy"] for one in result["contenders"] for trial in one["early"]) for result in results]
    lines = [f"| | setting | points behind on {', '.join(result['task'] for result in results)} | mean |"]
    lines.append("| --- | --- | --- | --- |")
    rows = []
    for name in (one["name"] for one in results[0]["contenders"]):
        early = [one["early"] for result in results for one in result["contenders"] if one["name"] == name]
        if len(early) < len(results):
            continue
        behind = [{json.dumps(t["values"]): 100 * (top - t["accuracy"]) for t in of} for of, top in zip(early, best)]
        common = set.intersection(*map(set, behind))
        point = min(sorted(common), key=lambda point: fmean(task[point] for task in behind))
        rows.append((fmean(task[point] for task in behind), name, point, [task[point] for task in behind]))
    for mean, name, point, each in sorted(rows):
        setting = ", ".join(f"{key} {json.dumps(value)}" for key, value in json.loads(point).items())
        lines.append(f"| {name} | {setting} | {', '.join(f'{value:.1f}' for value in each)} | {mean:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main("lengths", __doc__, run, table, together)
