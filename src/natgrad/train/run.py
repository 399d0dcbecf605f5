"""`natgrad train`: a recipe from its first step to a folder that tells what happened."""

from dataclasses import dataclass
from pathlib import Path

import torch

from natgrad.parallel import World
from natgrad.train import machine, tensorboard
from natgrad.train.log import Display, Journal, RunFolder, check_free
from natgrad.train.loop import Job, build_model, prepare, steps
from natgrad.train.recipe import Recipe, described
from natgrad.train.stop import Stop


@dataclass(frozen=True)
class Options:
    """How a run is carried out; nothing here is meant to change its result."""

    ranks: int = 1
    """Processes to start on this machine; under torchrun its own ranks count."""
    out: str | None = None
    """Folder for the results; None: runs/ and the recipe's name."""
    overwrite: bool = False
    """Replace the results of an earlier run in that folder."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    train_loss: bool = False
    """At the end, also judge the model on the whole training set."""
    tensorboard: bool = False
    """Write the run's numbers for TensorBoard, too: into the folder tensorboard of the results."""

    def folder(self, name: str) -> Path:
        return Path(self.out or f"runs/{name}")


def check(name: str, recipe: Recipe, options: Options) -> None:
    """Raise ValueError for all that can be known to be wrong before data are read or ranks started."""
    if options.ranks < 1:
        raise ValueError(f"ranks={options.ranks} must be at least 1; set --ranks")
    pick_device(options.device, World())
    if options.tensorboard:
        tensorboard.check_installed()
    check_free(options.folder(name), options.overwrite)
    recipe.check()
    recipe.optimizer.build(build_model(recipe), World())


def pick_device(name: str, world: World) -> torch.device:
    """Return this rank's device, by the rank's number on its machine where there are several GPUs."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={name!r} is unknown; choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' but torch sees no GPU; use --device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", world.rank % torch.cuda.device_count())


def run(name: str, recipe: Recipe, options: Options, world: World) -> str:
    """Train, judge and record, on every rank; return "finished" or "interrupted"."""
    device = pick_device(options.device, world)
    job = prepare(recipe, world, recipe.data.load().to(device))
    journal = Journal()
    if world.rank == 0:
        about = {"name": name, "recipe": described(recipe), "steps": job.steps}
        about["machine"] = machine.describe(world, device)
        folder = RunFolder(options.folder(name), about, options.overwrite)
        journal = Journal(folder, Display(name, job.steps), options.tensorboard)
    status = "failed"
    try:
        with Stop() as stop:
            status = follow(job, journal, stop)
            if status == "finished" and options.train_loss:
                journal.judged("train", job.score("train"))
    except KeyboardInterrupt:
        status = "interrupted"
    finally:
        journal.close(status)
    return status


def follow(job: Job, journal: Journal, stop: Stop) -> str:
    """Take all steps, judging the model on the way, unless stopped."""
    every = job.recipe.evaluate_every or len(job.sampler)
    for step in steps(job, stop):
        journal.step(step)
        if step.stop:
            return "interrupted"
        if step.step % every == 0 or step.step == job.steps:
            journal.evaluation(step, job.score())
    return "finished"
