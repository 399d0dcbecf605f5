"""How far and along which momentum should a step go? Lengths x placement of momentum, tuned alike.

    python benchmarks/lengths.py --data data/cifar100      both tasks; about 40 minutes on one core
    python benchmarks/lengths.py --show                    the tables of the committed results

Every contender has a grid of 12 points: 4 learning rates x 3 dampings (SGD: x 3 momenta, AdamW: x 3 pairs of betas).
All points train for half of the steps and are judged on validation images; the best three again for all steps with
another seed; the best of these is run with three fresh seeds and judged on the test images. Where the choice lies at
an end of its range of learning rates or dampings, the range is widened by one more point, three times at most.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from study import Study, main, merit
from torch import nn
from torch.optim import Optimizer

import natgrad
from natgrad.optim.blocks import spngd_blocks
from natgrad.parallel import World
from natgrad.train.optimizers import LENGTHS, AdamW, KFac, Sgd, SpNgd
from natgrad.train.tasks import Contender

EARLY, LATE, FRESH = 100, 101, (1, 2, 3)  # seeds
FINALISTS, WIDER = 3, 3
DAMPING = SpNgd().damping
WITHIN = 0.02  # of the best accuracy: a learning rate that will do


@dataclass(frozen=True)
class KFacUnitwise(KFac):
    """K-FAC with SP-NGD's blocks for norms, and momentum where it is wanted."""

    before: bool = False

    def build(self, model: nn.Module, world: World) -> Optimizer:
        return natgrad.KFAC(
            model,
            self.lr,
            momentum=self.momentum,
            damping=self.damping,
            refresh=self.refresh,
            decay=self.decay,
            samples=self.samples,
            length=LENGTHS[self.length],
            rule=natgrad.Momentum(self.before),
            curvature=spngd_blocks,
            world=world,
        )


def contenders(task: str) -> list[Contender]:
    """The six choices of SP-NGD, two that users would pick, and some choices rescaled and as K-FAC."""
    low = task == "digits"
    damping = (1e-4, 1e-3, 1e-2)
    small = {"lr": (0.003, 0.01, 0.03, 0.1) if low else (0.01, 0.03, 0.1, 0.3), "damping": damping}
    large = {"lr": (0.01, 0.03, 0.1, 0.3), "damping": damping}
    every = 2 if low else 10

    def of(length: Any) -> dict:
        return large if length == "trust" else small

    choices = [(length, before) for length in LENGTHS for before in (False, True)]
    return [
        *(
            Contender(title(length, before), SpNgd(length=length, before=before), of(length))
            for length, before in choices
        ),
        Contender("SGD, Nesterov", Sgd(nesterov=True), {"lr": (0.03, 0.1, 0.3, 1.0), "momentum": (0.8, 0.9, 0.95)}),
        Contender(
            "AdamW", AdamW(), {"lr": (0.001, 0.003, 0.01, 0.03), "betas": ((0.9, 0.999), (0.9, 0.99), (0.8, 0.95))}
        ),
        *(
            Contender(
                title(length, before) + ", rescaled", SpNgd(length=length, before=before, rescale="always"), of(length)
            )
            for length, before in RESCALED
        ),
        *(
            Contender(
                "K-FAC " + title(length, before), KFacUnitwise(length=length, before=before, refresh=every), of(length)
            )
            for length, before in KFAC
        ),
    ]


RESCALED: tuple[tuple[Any, bool], ...] = (("predicted_change", False),)
KFAC: tuple[tuple[Any, bool], ...] = (("predicted_change", False), ("plain", False))


def title(length: str, before: bool) -> str:
    return f"{length.replace('_', ' ')}, momentum {'before' if before else 'after'}"


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
    """The neighbours of a choice outside of its ranges of learning rates and dampings, by name of the range."""
    found = {}
    for name in ("lr", "damping"):
        if name not in chosen:
            continue
        others = sorted({point[name] for point in known})
        place = others.index(chosen[name])
        factor = 10 if name == "damping" else 3
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
        f"| | by lr | lr within 2 points | by damping | by lr, damping {DAMPING:g} | lr within 2 points |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in result["contenders"]:
        by_rate, by_damping = margin(one["early"], "lr"), margin(one["early"], "damping")
        fixed = margin([trial for trial in one["early"] if trial["values"].get("damping") == DAMPING], "lr")
        cells = [listed(by_rate), width(by_rate), listed(by_damping), listed(fixed), width(fixed) if fixed else "-"]
        lines.append(f"| {one['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def listed(accuracies: dict[float, float]) -> str:
    return ", ".join(f"{value:g}: {accuracy:.3f}" for value, accuracy in accuracies.items()) or "-"


if __name__ == "__main__":
    main("lengths", __doc__, run, table)
