"""A recipe is one training run as plain values: data, model, optimizer, schedule, length. It does nothing."""

import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from natgrad_lab.data import Regularisation, Source
from natgrad_lab.models import Architecture
from natgrad_lab.schedules import Constant, Cosine, Schedule
from natgrad_lab.train.optimizers import Settings, positive


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run's result."""

    data: Source
    """What to learn from, what to be judged by."""
    model: Architecture
    """The network."""
    optimizer: Settings
    """The optimizer and its numbers."""
    schedule: Schedule = field(default_factory=Cosine)
    """Multiplies the learning rate, by progress from 0 to 1."""
    damping_schedule: Schedule = field(default_factory=Constant)
    """Multiplies the damping of an optimizer that has one, by progress from 0 to 1."""
    regularisation: Regularisation = field(default_factory=Regularisation)
    """Running mixup and random erasing of the training images."""
    label_smoothing: float = 0.0
    """Share of a label that is spread evenly over the other classes, while learning."""
    batch: int = 128
    """Samples in a step, over all ranks."""
    batch_schedule: Schedule = field(default_factory=Constant)
    """Multiplies the batch, by progress from 0 to 1 at the start of each epoch."""
    micro_batch: int | None = None
    """Samples that a rank takes at once, the rest of its share one part after the other; None: all."""
    epochs: float = 10.0
    """Passes over the training data."""
    steps: int | None = None
    """Steps to take; counts instead of epochs where given."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the matrix products of forward and backward passes; float16 comes with a scaled loss."""
    channels_last: bool = False
    """Keep images channels last in memory, which convolutions on GPUs are fastest with."""
    compile: bool = False
    """Run the network by torch.compile, but for the steps in which curvature is measured."""
    drop_last: bool = False
    """Leave out the last batch of an epoch where it is not full."""
    seed: int = 0
    """Decides the initial weights, the order of the samples and their augmentation."""
    evaluate_every: int | None = None
    """Steps between two evaluations; None: once an epoch."""
    average: float | None = None
    """Share of the old that running means of the weights keep, less at the start, for evaluations; None: no means."""
    norm_samples: int = 4096
    """Training samples from which BatchNorm's statistics are estimated anew before an evaluation."""
    norms: Literal["estimate", "average"] = "estimate"
    """What BatchNorm judges by: statistics estimated anew, or the running ones, those of all ranks taken together."""

    def batches(self) -> tuple[int, ...]:
        """Samples in a step in each epoch of the run; one number for all where the batch does not change."""
        if isinstance(self.batch_schedule, Constant):
            return (self.batch,)
        progress = (epoch / self.epochs for epoch in range(math.ceil(self.epochs)))
        return tuple(round(self.batch * self.batch_schedule(t)) for t in progress)

    def check(self) -> None:
        """Raise a ValueError for values that no run could use, before anything is read or written."""
        self.check_values()
        self.data.check()

    def check_values(self) -> None:
        """Do the same, but for the data, which need not be there."""
        positive("lr", self.optimizer.lr)
        for name in ("batch", "micro_batch", "epochs", "steps", "evaluate_every", "norm_samples"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value:g} must be positive; set --{name.replace('_', '-')}")
        if self.average is not None and not 0 < self.average < 1:
            raise ValueError(f"average={self.average:g} must lie between 0 and 1; set --average")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing:g} must be at least 0 and below 1; 0.1 is common")
        for name, known in (("precision", ("float32", "bfloat16", "float16")), ("norms", ("estimate", "average"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose {', '.join(known)}")
        if self.norms == "average" and self.average is not None:
            raise ValueError(
                f"norms=average are statistics at the weights as they are, not at their running means "
                f"(average={self.average:g}); leave one out"
            )
        self.regularisation.check()
        self._check_batches()
        if not isinstance(self.damping_schedule, Constant) and not hasattr(self.optimizer, "damping"):
            names = type(self.damping_schedule).__name__, type(self.optimizer).__name__
            raise ValueError(f"damping_schedule={names[0]} but {names[1]} has no damping; leave it Constant()")

    def _check_batches(self) -> None:
        if isinstance(self.batch_schedule, Constant):
            return
        kind = type(self.batch_schedule).__name__
        if self.steps is not None:
            raise ValueError(f"steps={self.steps} beside batch_schedule={kind}, which counts in epochs; set --epochs")
        for epoch, batch in enumerate(self.batches()):
            if batch < 1:
                raise ValueError(f"batch_schedule={kind} leaves batch={batch} in epoch {epoch}; it must stay positive")


def described(value: Any) -> Any:
    """Turn nested settings into plain JSON values, each with the name of its kind."""
    if not is_dataclass(value) or isinstance(value, type):
        return value
    plain = {entry.name: described(getattr(value, entry.name)) for entry in fields(value)}
    return {"kind": type(value).__name__, **plain}
