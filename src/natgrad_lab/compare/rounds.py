"""`natgrad compare`: optimizers at equal budgets, tuned equally, on several seeds, judged on data never tuned on.

At each size of batch every contender gets the same number of points of its declared space, the same steps and seeds.
Each trial is remembered in a file as soon as it is done, so the same command goes on after an interruption.
"""

import importlib.util
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from natgrad.parallel import World
from natgrad_lab.compare.cell import Cell, Outcome, cell, count_steps
from natgrad_lab.compare.contenders import Contender
from natgrad_lab.compare.protocol import Plan, Protocol, check_folder, plan_of, plan_values, steps_of
from natgrad_lab.compare.race import Race, Standing, far_behind
from natgrad_lab.compare.record import results_of
from natgrad_lab.compare.screen import Screen
from natgrad_lab.compare.tasks import Batch, Task
from natgrad_lab.compare.trials import Trial, agree, merit, remember, remembered
from natgrad_lab.compare.workers import Here, Maker, TrialBench, Workers, drive
from natgrad_lab.report import write
from natgrad_lab.report.compare_read import read_comparison
from natgrad_lab.report.compare_terminal import show
from natgrad_lab.train import environment
from natgrad_lab.train.log import forget, write_json
from natgrad_lab.train.run import pick_device
from natgrad_lab.train.stop import Stop


def run(task: Task, protocol: Protocol, world: World) -> str:
    """Make the comparison on every rank, rank 0 writing and showing; return "finished" or "interrupted"."""
    plan = plan_of(task, protocol)
    if world.rank == 0:
        open_folder(task, protocol, plan.folder)
    with Stop() as stop:
        work = Work(task, protocol, plan, world, stop)
        try:
            finished = drive(work.cells(), work.make, work.stopped, work.finished)
        finally:
            work.close()
    if not finished:
        work.say("interrupted; the same command goes on from here")
        return "interrupted"
    if world.rank == 0:
        about = environment.describe(world, pick_device(protocol.device, world))
        if protocol.data.path:  # where data lie is nobody else's business
            about["command"] = about["command"].replace(protocol.data.path, "PATH")
        publish(work, about)
    return "finished"


def open_folder(task: Task, protocol: Protocol, folder: Path) -> None:
    """Make the folder ready: trials of the same task stay, unless told otherwise."""
    check_folder(task, protocol, folder)
    if protocol.overwrite:
        forget(folder, "trials/*.json", "results.json", "report.html")
    write_json(folder / "plan.json", plan_values(task, protocol))


class Work:
    """What all trials of a comparison share, and how far they are."""

    def __init__(self, task: Task, protocol: Protocol, plan: Plan, world: World, stop: Stop) -> None:
        self.task, self.protocol, self.plan, self.world = task, protocol, plan, world
        self.device, self.stop = pick_device(protocol.device, world), stop
        self.maker: Maker
        if protocol.workers > 1:
            self.maker = Workers(task, protocol.device, protocol.workers)
        else:
            self.maker = Here(TrialBench(task, protocol.device, world), stop)
        self.outcomes: list[Outcome] = []
        contenders, sizes = task.chosen(plan.profile.optimizers), plan.profile.batch
        self.pairs: list[tuple[Contender, Batch]] = [(one, batch) for batch in sizes for one in contenders]
        self.races = {batch: Race(len(contenders), self.decide) for batch in sizes}
        total = len(contenders) * sum(count_steps(plan, self.steps(batch)) for batch in sizes)
        self.screen = Screen(f"compare {task.name}", total) if world.rank == 0 else None
        self.say(f"{len(self.pairs)} pairs of optimizer and batch, {total} steps in all; results in {plan.folder}")

    def steps(self, batch: Batch) -> int:
        """The full budget at a size of batch."""
        return steps_of(self.task, self.protocol, batch)

    def stopped(self) -> bool:
        """Whether to stop between trials. In this process a trial itself looks, and all ranks stop in its same step."""
        return self.protocol.workers > 1 and self.stop()

    def cells(self) -> list[Cell]:
        """All pairs of contender and batch."""
        ranks = self.world.size
        return [cell(one, batch, self.steps(batch), self.plan, self.order, ranks) for one, batch in self.pairs]

    def make(self, asked: Trial | Standing) -> "Future[Any]":
        """Have a trial made, or say whether a contender is far behind as soon as all of its race have reported."""
        return self.races[asked.batch].join(asked) if isinstance(asked, Standing) else self.trial(asked)

    def trial(self, trial: Trial) -> "Future[Any]":
        """Take a trial's result from its file, or have it made and put there. Ranks but 0 know no file."""
        path = trial.file(self.task, self.plan.folder)
        known = remembered(path, self.protocol.reuse) if self.world.rank == 0 else None
        if agree(self.world, [known is not None], self.device)[0]:
            future: Future[Any] = Future()
            future.set_result(known or {"evaluations": []})
        else:
            future = self.maker.submit(trial)
        future.add_done_callback(partial(self.done, trial, path, known is not None))
        return future

    def done(self, trial: Trial, path: Path, known: bool, future: "Future[Any]") -> None:
        """Keep a new result and show that it is there."""
        if future.cancelled() or future.exception() or future.result() is None or self.screen is None:
            return
        if not known:
            remember(path, future.result())
        self.screen.trial(trial.title(), trial.steps, known)

    def order(self, results: list[list[Any]]) -> list[int]:
        """Return the places of points, best first, as rank 0 knows their results."""
        merits = [merit(runs) for runs in results] if self.world.rank == 0 else [0.0] * len(results)
        return agree(self.world, sorted(range(len(results)), key=lambda place: merits[place]), self.device)

    def decide(self, standings: list[Standing]) -> list[bool]:
        """Return who is far behind at a size of batch, as rank 0 knows the results, and say so in a line."""
        share = self.plan.profile.far_behind
        assert share is not None
        far = [False] * len(standings)
        if self.world.rank == 0:
            losses = [merit(standing.runs) for standing in standings]
            far = far_behind(losses, self.task.recipe.data.classes(), share)
        agreed = [bool(one) for one in agree(self.world, [int(one) for one in far], self.device)]
        names = sorted(standing.contender for standing, one in zip(standings, agreed) if one)
        if names and self.screen is not None:
            batch, steps = standings[0].batch, self.steps(standings[0].batch)
            fewer = count_steps(self.plan, steps) - count_steps(self.plan, steps, far=True)
            self.screen.drop(len(names) * fewer)
            self.say(f"batch {batch}: far behind after the first round, one point goes on: {', '.join(names)}")
        return agreed

    def finished(self, outcome: Outcome) -> None:
        """Keep what became of a contender and say it in a line."""
        self.outcomes.append(outcome)
        if self.screen is None:
            return
        metric, ends = self.task.metric, {}
        for one in outcome.tuned:
            runs = [final for final in outcome.finals if final["budget"] == one.steps and final["evaluations"]]
            ends[one.steps] = median([final["evaluations"][-1][metric] for final in runs]) if runs else None
        said = ", ".join(
            f"{'diverged' if end is None else f'{end:.4f}'} in {steps} steps" for steps, end in ends.items()
        )
        self.say(f"batch {outcome.batch}, {outcome.contender.name}: {metric} {said}")

    def say(self, text: str) -> None:
        """Print a line, once for all ranks."""
        if self.screen is not None:
            self.screen.say(text)

    def close(self) -> None:
        """End the workers and take the bar away."""
        self.maker.close()
        if self.screen is not None:
            self.screen.close()


def publish(work: Work, about: dict[str, Any]) -> None:
    """Write results.json and report.html, and print the table."""
    folder = work.plan.folder
    places = {pair: place for place, pair in enumerate((one.name, batch) for one, batch in work.pairs)}
    outcomes = sorted(work.outcomes, key=lambda one: places[one.contender.name, one.batch])
    plan = plan_values(work.task, work.protocol)
    write_json(folder / "results.json", results_of(plan, work.task.about, outcomes, about))
    show(read_comparison(folder))
    if importlib.util.find_spec("matplotlib") is None:
        work.say(f"results in {folder}/results.json; no report, which needs pip install 'natgrad[report]'")
        return
    work.say(f"report: {write([folder])}")
