"""`natgrad compare`: optimizers at equal budgets, tuned equally, on several seeds, judged on data never tuned
on.

    tuning   every contender: the same number of points of its own grid, the best of them again with other seeds,
             judged on images held out of training; a contender that claims to need fewer steps is tuned for those
    final    the best of each, on all training images: fresh seeds, the full budget of steps and half of it

The learning rate falls along the same cosine for all; only its start is tuned. All trials run in this one
job; each is remembered in a file as soon as it is done, so the same command goes on after an interruption.
"""

import importlib.util
import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from natgrad.data import Splits, hold_out
from natgrad.parallel import World
from natgrad.report import table, write
from natgrad.report.read import read
from natgrad.train import machine
from natgrad.train.log import Display, forget, write_json
from natgrad.train.loop import Step
from natgrad.train.protocol import Protocol, plan_of
from natgrad.train.run import pick_device
from natgrad.train.stop import Stop
from natgrad.train.tasks import Contender, Task
from natgrad.train.trials import Trial, agree, ranking, remember, remembered, run_trial

TUNING_SEEDS = (100, 101, 102)
SHORT = 0.5
"""The shorter budget of the final runs, as a share of the steps."""


@dataclass(frozen=True)
class Tuned:
    """A contender, the point of its grid that tuning chose, and all that was tried."""

    contender: Contender
    values: dict[str, Any]
    trials: list[Any]


def run(task: Task, protocol: Protocol, world: World) -> str:
    """Make the comparison on every rank, rank 0 writing and showing; return "finished" or "interrupted"."""
    device = pick_device(protocol.device, world)
    splits = task.data.load().to(device)
    if world.rank == 0:
        open_folder(protocol.folder(task), plan_of(task, protocol), protocol.overwrite)
    with Stop() as stop:
        work = Work(task, protocol, world, splits, stop)
        try:
            tuned = tune(work)
            finals = final(work, tuned) if tuned is not None else None
        finally:
            work.close()
    if tuned is None or finals is None:
        work.say("interrupted; the same command goes on from here")
        return "interrupted"
    if world.rank == 0:
        publish(work, tuned, finals, machine.describe(world, device))
    return "finished"


def open_folder(folder: Path, plan: Any, overwrite: bool) -> None:
    """Make the folder ready: results of the same plan stay, unless told otherwise."""
    if overwrite:
        forget(folder, "trials/*.json", "results.json", "report.html")
    write_json(folder / "plan.json", plan)


def tune(work: "Work") -> list[Tuned] | None:
    """Try every contender's points, the best of them again, and choose; None where stopped."""
    tuned = []
    for contender in work.contenders:
        points, steps = contender.points(work.protocol.trials), work.tuned_for(contender)
        results: list[list[Any]] = [[] for _ in points]
        order = list(range(len(points)))
        for seeds in (TUNING_SEEDS[:1], TUNING_SEEDS[1:]):
            for place, seed in product(order, seeds):
                result = work.result(Trial(contender, points[place], seed, steps, final=False))
                if result is None:
                    return None
                results[place].append(result)
            order = work.best(results, order)[: work.protocol.finalists]
        chosen = points[order[0]]
        tuned.append(Tuned(contender, chosen, [trial for trials in results for trial in trials]))
        work.say(f"{contender.name} is tuned: {', '.join(f'{name} {value}' for name, value in chosen.items())}")
    return tuned


def final(work: "Work", tuned: list[Tuned]) -> list[Any] | None:
    """Run the best of each with fresh seeds and both budgets, taking turns; None where stopped."""
    finals = []
    for seed in range(1, 1 + work.protocol.seeds):
        for steps in work.budgets:
            for chosen in tuned:
                result = work.result(Trial(chosen.contender, chosen.values, seed, steps, final=True))
                if result is None:
                    return None
                finals.append(result)
    return finals


def publish(work: "Work", tuned: list[Tuned], finals: list[Any], about: dict[str, Any]) -> None:
    """Write results.json and report.html, and print the table."""
    folder = work.protocol.folder(work.task)
    results = {
        "kind": "comparison",
        "plan": plan_of(work.task, work.protocol),
        "about": work.task.about,
        "batch": work.protocol.batch_of(work.task, work.splits),
        "machine": about,
        "tuned": [summary(chosen) for chosen in tuned],
        "finals": finals,
    }
    write_json(folder / "results.json", results)
    table.show(read([folder]))
    if importlib.util.find_spec("matplotlib") is None:
        work.say(f"results in {folder}/results.json; no report, which needs pip install 'natgrad[report]'")
        return
    work.say(f"report: {write([folder])}")


def summary(chosen: Tuned) -> dict[str, Any]:
    """Return a contender's tuning as plain values."""
    tried = [{"values": trial["values"], "seed": trial["seed"], **trial["evaluations"][-1]} for trial in chosen.trials]
    edges = chosen.contender.edges(chosen.values)
    return {"name": chosen.contender.name, "values": chosen.values, "at_edge": edges, "trials": tried}


class Work:
    """What all trials of a comparison share, and how far they are."""

    def __init__(self, task: Task, protocol: Protocol, world: World, splits: Splits, stop: Stop) -> None:
        self.task, self.protocol, self.world, self.splits, self.stop = task, protocol, world, splits, stop
        self.steps = protocol.steps_of(task)
        self.budgets = sorted({self.steps, max(1, round(SHORT * self.steps))}, reverse=True)
        self.contenders = task.chosen(protocol.contenders)
        self.tuning = hold_out(splits, protocol.held_out, seed=0)
        self.done = 0
        again = min(protocol.finalists, protocol.trials) * (len(TUNING_SEEDS) - 1)
        tuning = (protocol.trials + again) * sum(self.tuned_for(contender) for contender in self.contenders)
        total = tuning + len(self.contenders) * protocol.seeds * sum(self.budgets)
        self.display = Display(f"compare {task.name}", total) if world.rank == 0 else None

    def tuned_for(self, contender: Contender) -> int:
        """Return the number of steps that a contender's settings are chosen for."""
        return max(1, round(contender.share * self.steps))

    def result(self, trial: Trial) -> Any:
        """Return a trial's result, remembered or made now (true on ranks but 0); None where stopped."""
        folder = self.protocol.folder(self.task)
        known = remembered(trial, folder) if self.world.rank == 0 else None
        if agree(self.world, [known is not None], self.splits.train.device)[0]:
            self.done += trial.steps
            return known or True
        splits = self.splits if trial.final else self.tuning
        recipe = trial.recipe(self.task, self.protocol.batch_of(self.task, splits))
        result = run_trial(trial, recipe, splits, self.world, self.stop, self.tick)
        if result is not None and self.world.rank == 0:
            remember(trial, folder, result)
            last = result["evaluations"][-1]
            self.say(f"{trial.title()}: accuracy {last['accuracy']:.4f}, loss {last['loss'] or math.nan:.4f}")
        return result

    def best(self, results: list[list[Any]], places: list[int]) -> list[int]:
        """Return these places, best first, as rank 0 knows their results."""
        ranked = ranking([results[place] for place in places]) if self.world.rank == 0 else places
        order = agree(self.world, ranked, self.splits.train.device)
        return [places[rank] for rank in order]

    def tick(self, step: Step) -> None:
        """Show that a step is done."""
        self.done += 1
        if self.display is not None:
            self.display.step(self.done, step.loss)

    def say(self, text: str) -> None:
        """Print a line, once for all ranks."""
        if self.display is not None:
            self.display.say(text)

    def close(self) -> None:
        """Take the progress bar away."""
        if self.display is not None:
            self.display.close()
