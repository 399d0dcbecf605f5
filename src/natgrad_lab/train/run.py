"""`natgrad train`: a recipe from its first step to a folder that tells what happened."""

import math
import os
import shlex
import shutil
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from natgrad.optim import SecondOrder
from natgrad.parallel import TIMEOUT, World
from natgrad_lab.train import checkpoint, environment, tensorboard
from natgrad_lab.train.log import Display, Journal, RunFolder, check_free
from natgrad_lab.train.loop import Job, Step, build, build_model, prepare, steps
from natgrad_lab.train.ranks import Lock, everybody, on_first
from natgrad_lab.train.recipe import Recipe, described
from natgrad_lab.train.resume import (
    FOLDER,
    check_agreement,
    check_not_given_up,
    choose,
    ending,
    restarted,
    restore_all,
    set_later_aside,
)
from natgrad_lab.train.saver import Saver, write_weights
from natgrad_lab.train.sharded import Sharded
from natgrad_lab.train.state import check_recipe, state_of
from natgrad_lab.train.stop import Stop
from natgrad_lab.train.stragglers import Stragglers


@dataclass(frozen=True)
class Options:
    """How a run is carried out; nothing here is meant to change its result."""

    ranks: int = 1
    """Processes to start on this machine; under torchrun its own ranks count."""
    out: str | None = None
    """Folder for the results; None: runs/ and the recipe's name."""
    overwrite: bool = False
    """Replace the results of an earlier run in that folder."""
    shard: bool = False
    """Cut parameters, gradients and the optimizer's vectors over ranks (FSDP2), where each rank would hold them all."""
    replicas: int = 1
    """With --shard: how many ranks hold each part, as ranks are so many rows (HSDP)."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    train_loss: bool = False
    """At the end, also judge the model on the whole training set."""
    save_every: int | None = None
    """Steps between two checkpoints; None: one at the end of every epoch; 0: none at all."""
    keep: int = 2
    """Checkpoints that stay, the newest ones."""
    resume: bool = False
    """Go on from the last checkpoint of that folder; any number of ranks will do."""
    auto_resume: bool = False
    """Go on from the last good checkpoint of that folder if there is one, else begin: for jobs that are requeued."""
    checkpoint: int | None = None
    """With --resume: go on from the checkpoint after so many steps instead of the last."""
    accept_changes: bool = False
    """With --resume: go on although the recipe is not the checkpoint's."""
    max_restarts: int = 0
    """With --ranks: how often to start again from the last checkpoint when a rank has died."""
    timeout: float = TIMEOUT
    """Seconds for which a rank waits for another before the run ends in a line that names it. A disk gets half as long
    before a checkpoint is given up."""
    check: int | None = None
    """Steps from one comparison of all ranks' weights, clocks and shared numbers to the next, which stops a run whose
    ranks have drifted apart; None: never."""
    bad_steps: int = 5
    """Steps in a row whose loss is not finite, after which the run stops."""
    tensorboard: bool = False
    """Write the run's numbers for TensorBoard, too: into the folder tensorboard of the results."""

    @property
    def sharded(self) -> Sharded | None:
        """How the model is cut over ranks; None: every rank has all of it."""
        return Sharded(self.replicas) if self.shard else None

    def folder(self, name: str) -> Path:
        return Path(self.out or f"runs/{name}")


def check(name: str, recipe: Recipe, options: Options) -> None:
    """Raise ValueError for all that can be known to be wrong before data are read or ranks started."""
    if options.ranks < 1:
        raise ValueError(f"ranks={options.ranks} must be at least 1; set --ranks")
    check_options(options)
    if options.tensorboard:
        tensorboard.check_installed()
    folder = options.folder(name)
    if not options.resume:
        stopped = bool(checkpoint.found(folder / FOLDER)) and ending(folder).get("status") != "finished"
        check_free(folder, options.overwrite or options.auto_resume, stopped)
    elif not checkpoint.found(folder / FOLDER):
        raise ValueError(f"there is no checkpoint in {str(folder / FOLDER)!r} to resume from; leave --resume out")
    recipe.check()
    if options.sharded is not None:
        options.sharded.check(recipe, options.ranks)
    optimizer = recipe.optimizer.build(build_model(recipe), World())
    if options.sharded is not None and isinstance(optimizer, SecondOrder):
        optimizer.refuse_shards()
    if options.resume:
        check_resumed(folder / FOLDER, options, recipe)


def check_resumed(folder: Path, options: Options, recipe: Recipe) -> None:
    """Refuse the checkpoint of another recipe. One that is damaged is found when it is loaded."""
    step = checkpoint.found(folder)[-1] if options.checkpoint is None else options.checkpoint
    path = folder / checkpoint.name_of(step)
    try:
        values = checkpoint.read_values(path)
    except checkpoint.DamagedError:
        return
    check_recipe(path, values, recipe, options.accept_changes)


def check_options(options: Options) -> None:
    """Raise ValueError for options that cannot be, or that say nothing beside the others."""
    pick_device(options.device, World())
    least_of = {"keep": 1, "bad_steps": 1, "max_restarts": 0, "save_every": 0, "check": 1, "timeout": 1}
    for name, least in least_of.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}; set --{name.replace('_', '-')}")
    for name in ("checkpoint", "accept_changes"):
        if getattr(options, name) and not options.resume:
            raise ValueError(f"--{name.replace('_', '-')} says nothing without --resume")
    if options.resume + options.auto_resume + options.overwrite > 1:
        raise ValueError("--resume, --auto-resume and --overwrite exclude each other; leave all but one of them out")
    if options.replicas != 1 and not options.shard:
        raise ValueError("--replicas says nothing without --shard, where every rank has the whole model")
    if options.max_restarts and options.ranks == 1:
        raise ValueError("--max-restarts is for ranks that are started here: add --ranks, or tell torchrun")
    if options.max_restarts and options.save_every == 0:
        raise ValueError("--max-restarts starts again from a checkpoint, but --save-every 0 writes none")
    if options.save_every != 0:
        checkpoint.check()


def pick_device(name: str, world: World) -> torch.device:
    """Return this rank's device, by the rank's number on its machine where there are several GPUs."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={name!r} is unknown; choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' but torch sees no GPU; use --device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    place = int(os.environ.get("LOCAL_RANK", world.rank))  # hosts may have more GPUs than ranks
    return torch.device("cuda", place % torch.cuda.device_count())


def run(name: str, recipe: Recipe, options: Options, world: World) -> str:
    """Train, judge and record, on every rank; return "finished" or "interrupted"."""
    began = time.monotonic()
    check_agreement(recipe, world, shard=options.shard, replicas=options.replicas)
    device = pick_device(options.device, world)
    built = build(recipe, world, device, options.sharded)
    job = prepare(recipe, world, recipe.data.load().to(device), built)
    lock = on_first(world, lambda: Lock(options.folder(name)))  # a mistake in the recipe has made no folder
    try:
        return run_alone(name, options, job, began)
    finally:
        if lock is not None:
            lock.release()


def run_alone(name: str, options: Options, job: Job, began: float) -> str:
    """`run` in a folder that is ours; it began at this time of the monotonic clock."""
    folder, world = options.folder(name), job.world
    told: list[str] = []
    again = restarted(world)
    start = find_start(folder, options, world, again, told)
    if start is not None:
        restore_all(job, start, options.accept_changes)
    if options.save_every != 0:
        state_of(job)  # what cannot be saved is known before the first step
    journal = on_first(world, lambda: open_journal(name, options, job, again)) or Journal()
    for wrong in told:
        journal.event("damaged", reason=wrong)
    if start is not None:
        journal.event("resumed", step=job.done, path=str(start), ranks=world.size)
    job.tick = journal.judging
    saver = None
    if options.save_every != 0:
        saver = Saver(folder / FOLDER, world, options.keep, journal.event, options.timeout / 2)
    status = "failed"
    try:
        with Stop() as stop:
            ended = follow(job, journal, saver, options, stop)
            if ended == "finished":
                finish(job, journal, options, folder)
            status = ended
    except KeyboardInterrupt:
        status = "interrupted"
    except ValueError as error:
        journal.summary["reason"] = str(error)
        raise
    finally:
        last = saver.last() if saver is not None and status != "finished" and world.rank == 0 else None
        journal.summary["seconds_in_all"] = time.monotonic() - began  # of this start, reading and judging included
        journal.close(status, resume_command() if last is not None else None)
    return status


def find_start(folder: Path, options: Options, world: World, again: bool, told: list[str]) -> Path | None:
    """Return the checkpoint to go on from, if there is one; damaged ones that were passed over are put into `told`.

    again: this is not a launcher's first attempt.
    """
    if again:
        check_not_given_up(folder)
    if again or options.auto_resume:
        return choose(folder / FOLDER, None, world, told.append)
    return choose(folder / FOLDER, options.checkpoint, world, None) if options.resume else None


def open_journal(name: str, options: Options, job: Job, again: bool) -> Journal:
    """Begin a run's folder, or go on with one, and show what happens."""
    about = {"name": name, "recipe": described(job.recipe), "steps": job.steps}
    about["machine"] = environment.describe(job.world, job.device)
    folder, anew = options.folder(name), options.overwrite or options.auto_resume or again
    if job.done == 0 and anew:
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
    files = RunFolder(folder, about, anew, job.done or None)
    set_later_aside(folder / FOLDER, job.done)
    return Journal(files, Display(name, job.steps), options.tensorboard)


def follow(job: Job, journal: Journal, saver: Saver | None, options: Options, stop: Stop) -> str:
    """Take all steps, judging the model and saving on the way, unless stopped."""
    lost, status, stragglers = 0, "finished", Stragglers(job.world)
    for step in steps(job, stop):
        journal.step(step)
        for who, times in stragglers.add(step.stages).items():
            journal.event("straggler", step=step.step, who=who, times_as_slow=round(times, 1))
        lost = 0 if math.isfinite(step.loss) else lost + 1
        if lost >= options.bad_steps:
            raise ValueError(not_finite(step, lost, saver))
        if job.due(step.step):
            journal.evaluation(step, job.score())
            tell_bad(job, journal)
        if step.stop and step.step < job.steps:
            status = "interrupted"
        if saver is None:
            continue
        saver.poll()
        if lost == 0 and (step.stop or step.step == job.steps or saves(job, step.step, options.save_every)):
            saver.save(job)
    if saver is not None:
        saver.finish()
    return status


def tell_bad(job: Job, journal: Journal) -> None:
    """Name the images that any rank could not read and replaced, where there are more than before."""
    names = everybody(job.world, job.splits.bad())
    if len(names) > journal.summary.get("bad_images", 0):
        journal.summary["bad_images"] = len(names)
        journal.event("bad_images", count=len(names), names=names[:20])


def saves(job: Job, step: int, every: int | None) -> bool:
    """Say whether a checkpoint is written after so many steps."""
    return step % every == 0 if every else job.sampler.locate(step)[1] == 0


def not_finite(step: Step, lost: int, saver: Saver | None) -> str:
    """Say that the loss is lost, and where to go on from."""
    last = None
    if saver is not None:
        saver.finish()
        last = saver.last()
    good, how = "there is no checkpoint", ""
    if last is not None:
        good, how = (
            f"the last good checkpoint is {str(last)!r}",
            " (--resume --accept-changes goes on with other values)",
        )
    return (
        f"the loss has not been finite for {lost} steps, up to step {step.step}: {good}; lower --optimizer.lr or raise "
        f"the damping{how}"
    )


def finish(job: Job, journal: Journal, options: Options, folder: Path) -> None:
    """Judge once more where asked for, and leave the weights as the model was judged by, in one plain file."""
    if options.train_loss:
        journal.judged("train", job.score("train"))
    write_weights(job, folder / "model.pt", options.timeout / 2)


def resume_command() -> str:
    """Return the command that takes this run up again."""
    once = {"--overwrite", "--resume", "--auto-resume", "--checkpoint"}
    words = ["", *shlex.split(environment.command())]
    kept = [w for last, w in pairwise(words) if w.split("=")[0] not in once and last != "--checkpoint"]
    return shlex.join([*kept, "--resume"])
