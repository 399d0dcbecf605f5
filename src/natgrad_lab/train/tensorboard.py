"""A run's numbers for TensorBoard, by step and by epoch: `tensorboard --logdir runs`.

TensorBoard counts in whole numbers, so steps and epochs have a folder each. What is read as it was shown elsewhere:
loss, lr, damping, the share of refreshed statistics, how long the step was, seconds by stage, images a second, memory,
test scores.
"""

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from natgrad_lab.train.evaluate import Score
from natgrad_lab.train.loop import Step

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"


def check_installed() -> None:
    """Raise ValueError where TensorBoard is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs a package: pip install 'natgrad[tensorboard]', or leave the option out")


TOLD = ("damping", "refreshed", "change", "bound", "factor", "ratio", "loose", "noise_scale")
"""What is written of a second-order optimizer's step."""


class Board:
    """Writes into `folder`; of a run that is taken up after step `resume_at`, what was told later is taken back."""

    def __init__(self, folder: Path, resume_at: int | None = None) -> None:
        self.folder = folder / FOLDER
        self.steps = self._writer("steps", None if resume_at is None else resume_at + 1)
        self.resumed = resume_at is not None
        self.epochs: SummaryWriter | None = None
        self.epoch, self.sums, self.count = 0, dict[str, float](), 0

    def _writer(self, name: str, purge: int | None) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter  # seconds to import, and an extra

        return SummaryWriter(str(self.folder / name), purge_step=purge)

    def step(self, step: Step, memory: int | None) -> None:
        """Write all numbers of a step, and the means of an epoch that is over."""
        numbers = {
            "loss": step.loss,
            "lr": step.lr,
            **{name: step.second_order[name] for name in TOLD if name in step.second_order},
            "seconds": step.seconds,
            "images_per_second": step.images_per_second,
            **({"memory_gb": memory / 1e9} if memory is not None else {}),
            **{f"stages/{stage}": seconds for stage, seconds in step.stages.items()},
        }
        for name, value in numbers.items():
            self.steps.add_scalar(name, value, step.step)
        self._enter(math.ceil(step.epoch - 1e-9))
        self.count += 1
        for name, value in numbers.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def evaluation(self, step: Step, score: Score) -> None:
        """Write how good the model is after a step."""
        for name, value in (("test/accuracy", score.accuracy), ("test/loss", score.loss)):
            self.steps.add_scalar(name, value, step.step)
            self._by_epoch(name, value)
        self.steps.flush()

    def _enter(self, epoch: int) -> None:
        """Begin an epoch, if it is another than that of the last step."""
        if epoch == self.epoch:
            return
        self._tell()
        self.epoch = epoch
        if self.epochs is None:
            self.epochs = self._writer("epochs", epoch if self.resumed else None)

    def _tell(self) -> None:
        """Write the means over the steps of this epoch."""
        for name, value in self.sums.items():
            self._by_epoch(name, value / self.count)
        self.sums, self.count = {}, 0

    def _by_epoch(self, name: str, value: Any) -> None:
        if self.epochs is not None:
            self.epochs.add_scalar(f"epoch/{name}", value, self.epoch)

    def close(self) -> None:
        """Write what is left."""
        self._tell()
        for writer in (self.steps, self.epochs):
            if writer is not None:
                writer.close()
