"""How optimizers are compared: the numbers of a comparison, what is wrong with them, and what they decide.

Everyone gets, at each size of batch, the same number of tuning trials, steps, samples and seeds.
"""

import functools
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from natgrad.parallel import World
from natgrad_lab.compare.tasks import Batch, Profile, Task
from natgrad_lab.compare.transfer import Stated, Transfer
from natgrad_lab.data import Splits
from natgrad_lab.train import environment
from natgrad_lab.train.loop import build_model
from natgrad_lab.train.recipe import described
from natgrad_lab.train.run import pick_device


@dataclass(frozen=True)
class Files:
    """Where a task's data lie."""

    path: str | None = None
    """Folder of the data; None: the task's own."""


@dataclass(frozen=True)
class Protocol:
    """How a comparison is made."""

    profile: str | None = None
    """How much: a named set of the numbers that are None below; None: the task's first."""
    optimizers: tuple[str, ...] = ()
    """Who is compared, by name or import path (./mine.py:MyOptimizer); none named: the profile's."""
    model: str | None = None
    """Another network, by name or import path (./mine.py:make); None: the task's."""
    batch: tuple[Batch, ...] = ()
    """Samples in a step, over all ranks, several sizes to be compared at each; none: the profile's."""
    trials: int | None = None
    """Points of its space that each optimizer may try at each size of batch."""
    seeds: int | None = None
    """Fresh seeds for the final runs."""
    finalists: int | None = None
    """The best points, which are tried with one more seed before one is chosen; 1: the best is chosen at once."""
    halving: bool | None = None
    """Try all points at a quarter of the steps, the best half at half of them, the best quarter at all."""
    half: bool | None = None
    """Tune for half of the steps too, and make final runs of that length."""
    far_behind: float | None = None
    """Share of the leader's progress after the first round of tuning, below which an optimizer goes on with one point;
    progress is the fall of the held-out loss from that of an even guess. 0: everybody goes on alike."""
    settings: str | None = None
    """Folder of a finished comparison: nothing is tuned, each optimizer takes the values that were chosen there."""
    settings_batch: Batch | None = None
    """With settings: the size of batch there; None: the same as here, or the only one."""
    steps: int | None = None
    """Steps of a run at every size of batch; None: the task's, by size."""
    ranks: int = 1
    """Processes that share each run, started on this machine; under torchrun its own ranks count."""
    workers: int = 1
    """Runs to make at a time, each in a process of its own."""
    out: str | None = None
    """Folder for the results; None: runs/compare- and the task's name."""
    data: Files = field(default_factory=Files)
    """Where data lie that are not installed with python."""
    overwrite: bool = False
    """Forget the results of another comparison in that folder."""
    reuse: bool = False
    """Keep results in that folder that another version or commit of natgrad or torch has made; the report says so."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""


class Plan(NamedTuple):
    """A protocol with everything filled in."""

    profile: Profile
    folder: Path
    transfer: Transfer | Stated | None = None
    """Where settings are taken from; None: they are tuned."""

    def budgets(self, steps: int) -> list[int]:
        """Return the numbers of steps that are tuned for, each by itself, and run: all first."""
        return sorted({steps, short(steps)}, reverse=True) if self.profile.half else [steps]

    def rungs(self, steps: int) -> list["Rung"]:
        """Return the rounds of tuning: how many points, for how many steps. Schedules shrink with the steps."""
        trials, half = self.profile.trials, short(steps)
        if not self.profile.halving:
            return [Rung(trials, count) for count in reversed(self.budgets(steps))]
        quarter = max(1, round(steps / 4))
        return [Rung(trials, quarter), Rung(math.ceil(trials / 2), half), Rung(math.ceil(trials / 4), steps)]


class Rung(NamedTuple):
    """A round of tuning."""

    points: int
    steps: int


def short(steps: int) -> int:
    """The shorter of the two budgets: half of the steps."""
    return max(1, round(steps / 2))


def plan_of(task: Task, protocol: Protocol) -> Plan:
    """Fill in what the command line left to the profile."""
    base = task.profile(protocol.profile)
    names = ("trials", "seeds", "finalists", "halving", "half", "far_behind")
    given = {name: getattr(protocol, name) for name in names}
    profile = replace(
        base,
        optimizers=protocol.optimizers or base.optimizers,
        batch=protocol.batch or base.batch,
        **{name: value for name, value in given.items() if value is not None},
    )
    transfer: Transfer | Stated | None = base.stated if protocol.trials is None else None
    if protocol.settings is not None:
        transfer = Transfer(Path(protocol.settings), protocol.settings_batch)
    if transfer is not None:
        profile = replace(profile, trials=0, far_behind=None)
    elif profile.far_behind == 0:
        profile = replace(profile, far_behind=None)
    return Plan(profile, Path(protocol.out or f"runs/compare-{task.name}"), transfer)


def steps_of(task: Task, protocol: Protocol, batch: Batch) -> int:
    """Return the steps of a run."""
    stated = task.profile(protocol.profile).steps if protocol.steps is None else protocol.steps
    return task.steps_of(batch) if stated is None else stated


def samples_of(batch: Batch, splits: Splits) -> int:
    """Return the samples in a batch; "full" is all there are to train on."""
    return len(splits.train) if batch == "full" else batch


def check(task: Task, protocol: Protocol) -> None:
    """Raise ValueError for anything that can be known to be wrong before processes are started."""
    plan = plan_of(task, protocol)
    if protocol.settings is None and protocol.settings_batch is not None:
        raise ValueError(f"settings_batch={protocol.settings_batch} says nothing without --settings; leave it out")
    numbers: dict[str, Any] = {"ranks": protocol.ranks, "workers": protocol.workers, "steps": protocol.steps}
    numbers |= {name: getattr(plan.profile, name) for name in ("finalists", "seeds")}
    check_tuning(protocol, plan)
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1; set --{name}")
    for batch in plan.profile.batch:
        if batch != "full" and batch < 1:
            raise ValueError(f"batch={batch} must be at least 1, or full for the whole training set; set --batch")
    if protocol.ranks > 1 and protocol.workers > 1:
        raise ValueError(f"workers={protocol.workers} beside ranks={protocol.ranks}; several runs or several ranks")
    pick_device(protocol.device, World())
    contenders = task.chosen(plan.profile.optimizers)
    task.recipe.data.check()
    for contender in contenders:
        build(task, contender)
        if plan.transfer is not None:
            for batch in plan.profile.batch:
                plan.transfer.values(contender, batch)
    check_folder(task, protocol, plan.folder)


def check_tuning(protocol: Protocol, plan: Plan) -> None:
    """Refuse tuning without points, and numbers of the tuning beside settings that are taken over."""
    if plan.transfer is None:
        if plan.profile.trials < 1:
            raise ValueError(
                f"trials={plan.profile.trials} must be at least 1 where settings are tuned; set --trials, or "
                "--settings to the folder of a finished comparison"
            )
        share = plan.profile.far_behind
        if share is not None and not 0 < share < 1:
            raise ValueError(f"far_behind={share:g} must lie between 0 and 1; set --far-behind 0.6")
        return
    for name in ("trials", "finalists", "halving", "far_behind"):
        if getattr(protocol, name) is not None:
            flag, value = name.replace("_", "-"), getattr(protocol, name)
            raise ValueError(
                f"{name}={value} says nothing where settings are taken over and nothing is tuned; leave --{flag} out"
            )


def build(task: Task, contender: Any) -> None:
    """Build a contender's optimizer once: what it needs may not be installed."""
    settings = contender.settings(contender.points(1)[0])
    settings.build(build_model(task.recipe), World())


def check_folder(task: Task, protocol: Protocol, folder: Path) -> None:
    """Refuse a folder of something else, and results that other code has made."""
    if folder.is_file():
        raise ValueError(f"--out {str(folder)!r} is a file; name a folder")
    if protocol.overwrite or not folder.exists() or not any(folder.iterdir()):
        return
    path = folder / "plan.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    if before.get("task") != task_values(task):
        raise ValueError(f"--out {str(folder)!r} holds something else; add --overwrite, or name another folder")
    if before["made_by"] != made_by() and not protocol.reuse:
        raise ValueError(
            f"--out {str(folder)!r} holds results of another version or commit; add --reuse to keep them, "
            "--overwrite to forget them"
        )


def task_values(task: Task) -> Any:
    """Return what decides a task's results, as JSON gives it back; where its data lie does not."""
    recipe = described(task.recipe)
    recipe["data"].pop("path", None)
    names = ("name", "metric", "held_out", "points", *(() if task.judged is None else ("judged",)))
    return json.loads(json.dumps({"recipe": recipe, **{name: getattr(task, name) for name in names}}))


@functools.cache
def made_by() -> dict[str, Any]:
    """Return the versions and the commit of the code that runs."""
    return {**{name: environment.installed(name) for name in ("natgrad", "torch")}, "commit": environment.commit()}


def plan_values(task: Task, protocol: Protocol) -> Any:
    """Return a comparison's plan as plain values, for the record and the report."""
    plan = plan_of(task, protocol)
    contenders = task.chosen(plan.profile.optimizers)
    return {
        "task": task_values(task),
        "made_by": made_by(),
        "targets": list(task.targets),
        "profile": vars(plan.profile),
        "steps": {str(batch): steps_of(task, protocol, batch) for batch in plan.profile.batch},
        "settings": {str(batch): plan.transfer.words(batch) for batch in plan.profile.batch} if plan.transfer else None,
        "ranks": protocol.ranks,
        "workers": protocol.workers,
        "spaces": {
            one.name: {name: dimension.words() for name, dimension in one.all_of().items()} for one in contenders
        },
        "kinds": {one.name: one.kind for one in contenders},
    }
