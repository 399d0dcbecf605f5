"""The training loop for any recipe, on one rank or many: each takes its share of every batch.

    share of the batch -> its parts: mixup, erasing, loss, gradient -> optimizer.step() -> one record

What travels between ranks: gradients (and what a second-order optimizer needs) within `optimizer.step()`, and
two numbers a step, the loss and whether anyone wants to stop; so all ranks stop after the same step.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional as F
from torch.optim import Optimizer

from natgrad.optim import SecondOrder
from natgrad.parallel import World, compare, local_of, reshard, sharding_of
from natgrad_lab.data import Regulariser, Sampler, Splits, read_ahead
from natgrad_lab.data.sampler import Batch, alike
from natgrad_lab.train.average import Average
from natgrad_lab.train.evaluate import CHUNK, Score, Tick, average_norms, estimate_norms, evaluate, quietly
from natgrad_lab.train.precision import Precision, arrange
from natgrad_lab.train.randomness import seed_build, seed_step
from natgrad_lab.train.recipe import Recipe
from natgrad_lab.train.scheduled_values import Pace
from natgrad_lab.train.sharded import Sharded
from natgrad_lab.train.timing import Clock, own_seconds, second_order, split

BUILDING = threading.Lock()
"""Ranks may be threads, which share the generators that networks are initialised from."""


@dataclass
class Job:
    """A recipe made ready to run on this rank."""

    recipe: Recipe
    world: World
    splits: Splits
    model: nn.Module
    optimizer: Optimizer
    sampler: Sampler
    regulariser: Regulariser
    steps: int
    average: Average
    pace: Pace
    precision: Precision
    done: int = 0
    """Steps that have been taken."""
    elapsed: float = 0.0
    """Seconds of training so far."""
    tick: Tick = quietly
    """Told which share of an evaluation is done."""

    @property
    def scaler(self) -> GradScaler | None:
        """What scales the loss in float16; a checkpoint holds its state_dict()."""
        return self.precision.scaler

    @property
    def device(self) -> torch.device:
        return self.splits.train.device

    def progress(self, step: int) -> float:
        """Return which share of the run lies behind after so many steps: in epochs where their lengths differ."""
        if len(self.sampler.batches) == 1:
            return step / self.steps
        return self.sampler.epochs_at(step) / self.sampler.epochs_at(self.steps)

    def due(self, step: int) -> bool:
        """Return whether the model is judged after so many steps: at ends of epochs if the recipe says nothing else."""
        every = self.recipe.evaluate_every
        ends = step % every == 0 if every else self.sampler.locate(step)[1] == 0
        return ends or step == self.steps

    def score(self, split: str = "test") -> Score:
        """Judge the model (its means, if there are some) on one split, BatchNorm's statistics estimated anew."""
        chunk = min(CHUNK, self.recipe.micro_batch or CHUNK)
        with self.average.in_place(), self.precision.autocast():
            if self.recipe.norms == "estimate":
                estimate_norms(self.model, self.splits.train, self.world, self.recipe.norm_samples, chunk)
            else:
                average_norms(self.model, self.world)
            score = evaluate(self.model, getattr(self.splits, split), self.world, chunk, self.tick)
            reshard(self.model)  # what FSDP has gathered is the weights that were judged
        return score


@dataclass
class Step:
    """What is known after a step; seconds count training alone, not what happens between two steps."""

    step: int
    epoch: float
    loss: float
    """Of what was trained on (blended images have blended labels): mean over the batch on all ranks."""
    lr: float
    seconds: float
    elapsed: float
    """Seconds of training so far."""
    images_per_second: float
    stages: dict[str, float]
    """Seconds by stage of the step."""
    second_order: dict[str, Any] = field(default_factory=dict)
    """Damping, share of statistics refreshed, intervals and traffic by stage, where the optimizer has them."""
    stop: bool = False
    """Whether any rank was asked to stop."""


class Learner(NamedTuple):
    """What learns: a network in its precision, and its optimizer."""

    model: nn.Module
    precision: Precision
    optimizer: Optimizer


def build(recipe: Recipe, world: World, device: torch.device, sharded: Sharded | None = None) -> Learner:
    """Build network and optimizer, for which no data are needed.

    sharded: how the network is cut over ranks; None: every rank has all of it.

    Raises:
        ValueError: values that do not fit each other.

    """
    recipe.check_values()
    model = build_model(recipe)
    if sharded is not None:
        sharded.check(recipe, world.size)
        model = sharded.cut(model, world.size, device)
    model = arrange(model.to(device), recipe.channels_last, recipe.compile, device)
    precision = Precision(recipe.precision, device, world)
    return Learner(model, precision, precision(recipe.optimizer.build(model, world)))


def prepare(recipe: Recipe, world: World, splits: Splits, built: Learner | None = None) -> Job:
    """Bring data and network together; raise ValueError for values that do not fit each other.

    built: network and optimizer, where they were built before the data were read.
    """
    recipe.check_values()
    train = splits.train
    sampler = Sampler(len(train), recipe.batches(), recipe.seed, world.rank, world.size, recipe.drop_last)
    steps = recipe.steps if recipe.steps is not None else sampler.total_steps(recipe.epochs)
    if steps < 1:
        each = sampler.length(0)
        raise ValueError(f"epochs={recipe.epochs:g} of {each} steps make no step; raise epochs or set steps")
    model, precision, optimizer = built or build(recipe, world, train.device)
    regulariser, average = Regulariser(recipe.regularisation, train.classes), Average(model, recipe.average)
    pace = Pace(optimizer, lr=recipe.schedule, damping=recipe.damping_schedule)
    return Job(recipe, world, splits, model, optimizer, sampler, regulariser, steps, average, pace, precision)


def build_model(recipe: Recipe) -> nn.Module:
    """Initialise the recipe's network from its seed: the same on every rank."""
    recipe.model.load()
    with BUILDING:
        seed_build(recipe.seed)
        return recipe.model.build(recipe.data.shape(), recipe.data.classes())


def steps(job: Job, stop: Callable[[], bool] = lambda: False) -> Iterator[Step]:
    """Train, yielding a record after each step; the job's model may be judged in between."""
    sampler, size = job.sampler, job.recipe.micro_batch  # what reads ahead must not hold the job, which holds it
    coming = (index for batch in sampler.stream(job.done) for index in cut(batch, size))
    job.splits = replace(job.splits, train=read_ahead(job.splits.train, coming))
    for step, batch in zip(range(job.done + 1, job.steps + 1), job.sampler.stream(job.done)):
        job.pace.set(job.progress(step - 1))
        before, clock = own_seconds(job.optimizer), Clock(job.device)
        loss = descend(job, batch, step, clock)
        news = torch.stack((loss, loss.new_tensor(float(stop()))))
        job.world.mean([news])
        value, stopping = news.tolist()
        clock.lap("other")
        job.done, job.elapsed = step, job.elapsed + clock.total
        yield Step(
            step=step,
            epoch=job.sampler.epochs_at(step),
            loss=value,
            lr=job.optimizer.param_groups[0]["lr"],
            seconds=clock.total,
            elapsed=job.elapsed,
            images_per_second=batch.total / clock.total,
            stages=split(clock.laps, before, own_seconds(job.optimizer)),
            second_order=second_order(job.optimizer),
            stop=stopping > 0,
        )
        if stopping > 0:
            return


def descend(job: Job, batch: Batch, step: int, clock: Clock) -> Tensor:
    """Take one step on this rank's share of a batch; return the share's part of the loss, such that ranks'
    mean it.

    Shares may differ by one sample, so a rank's loss is its sum over (samples in the batch / ranks). Gradients of the
    share's parts add up, and a second-order optimizer's statistics with them.
    """
    seed = (job.recipe.seed * 1_000_003 + step) * job.world.size + job.world.rank
    generator = torch.Generator().manual_seed(seed)
    seed_step(job.recipe.seed, step, job.world.rank)
    total = torch.zeros((), device=job.device)
    keeps, kept = job.recipe.optimizer.looks_again and not remade(job), []
    last = len(cut(batch, job.recipe.micro_batch)) - 1
    for part, (inputs, targets) in enumerate(parts(job, batch, generator)):
        clock.lap("data")
        output = job.precision.forward(job.model, inputs)
        loss = loss_of(output, targets, job.recipe.label_smoothing) * (job.world.size / batch.total)
        job.recipe.optimizer.before_backward(job.optimizer, logits_of(output))
        with nullcontext() if part == last else unsent(job.optimizer):
            job.precision.backward(loss)
        total += loss.detach()
        if keeps:
            kept.append(inputs)
        clock.lap("network")

    def again() -> Tensor:
        made = kept if keeps else (x for x, _ in parts(job, batch, torch.Generator().manual_seed(seed)))
        return torch.cat([logits_of(job.model(inputs)) for inputs in made])

    job.recipe.optimizer.take(job.precision.stepper(job.optimizer), total, again)
    job.optimizer.zero_grad()
    job.average.add(step)
    if job.world.check and step % job.world.check == 0 and not isinstance(job.optimizer, SecondOrder):
        compare_ranks(job, step)  # natgrad's optimizers do it themselves
    clock.lap("update")
    return total


def compare_ranks(job: Job, step: int) -> None:
    """Compare weights and the numbers of groups over ranks, of an optimizer that knows nothing of ranks."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in job.optimizer.param_groups]
    numbers = {f"param_groups[{k}][{key!r}]": value for k, group in enumerate(groups) for key, value in group.items()}
    weights = {name: local_of(parameter) for name, parameter in job.model.named_parameters()}
    sharding = sharding_of(job.model, job.world)
    part, parts = (0, 1) if sharding is None else (sharding.shard, sharding.shards)
    compare(job.world, f"after step {step}", numbers, weights, part, parts)


def unsent(optimizer: Optimizer) -> AbstractContextManager[Any]:
    """Around a backward pass that is not a step's last: gradients that would leave as they come add up instead."""
    return optimizer.no_sync() if isinstance(optimizer, SecondOrder) else nullcontext()


def remade(job: Job) -> bool:
    """Whether a share's inputs can be made once more, so that they need not be kept: 131,072 of 224x224 are 79 GB.

    Not so where they are blended with their past, which mixup holds anyway, or read from files.
    """
    return job.recipe.regularisation.mixup == 0 and isinstance(job.splits.train.images, Tensor)


def loss_of(output: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """The summed cross entropy to labels [n] or [n, classes], of which `smoothing` goes to the other classes.

    Labels [n, places] of an output [n, places, classes]: a sample's loss is the mean over its places.
    """
    if output.dim() == 3:
        return loss_of(logits_of(output), targets.flatten(), smoothing) / output.shape[1]
    classes = output.shape[1]
    spread = smoothing * classes / max(classes - 1, 1)  # torch spreads it over all classes, the label's own too
    return F.cross_entropy(output, targets, reduction="sum", label_smoothing=min(spread, 1.0))


def logits_of(output: Tensor) -> Tensor:
    """Rows of logits [predictions, classes] of an output [n, classes] or [n, places, classes]."""
    return output.flatten(0, -2)


def parts(job: Job, batch: Batch, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's share, varied, blended and erased: inputs [n, c, h, w], and labels [n] or [n, classes]."""
    for part, index in enumerate(cut(batch, job.recipe.micro_batch)):
        inputs, labels = job.splits.train.batch(index, generator)
        yield job.regulariser(part, job.splits.augment(inputs, generator), labels, generator)


def cut(batch: Batch, size: int | None) -> tuple[Tensor, ...]:
    """Cut a rank's share of a batch into parts of at most `size` samples; None: one part."""
    return tuple(part for part in alike(batch.index, size or batch.most, batch.most) if len(part))
