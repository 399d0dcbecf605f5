"""The numbers of an optimizer as a recipe holds them, and what those need that know nothing of ranks."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from natgrad.parallel import OwnedTensor, World, sharding_of, spread_to_replicas


@dataclass(frozen=True)
class Settings:
    """The numbers of an optimizer; `build` makes one for a model on the ranks of a world."""

    lr: float = 0.1
    """Learning rate at the start; the schedule multiplies it."""

    def build(self, model: nn.Module, world: World) -> Optimizer:
        raise NotImplementedError(f"{type(self).__name__} does not say how to build its optimizer")

    @property
    def cuttable(self) -> bool:
        """Whether the optimizer steps alike where every rank holds a part of each parameter (fully_shard)."""
        return False

    @property
    def looks_again(self) -> bool:
        """Whether `take` calls its `again`, so that inputs must be kept until then."""
        return False

    def before_backward(self, optimizer: Optimizer, output: Tensor) -> None:
        """Called with a part's logits between its forward and its backward pass; most have nothing to do."""

    def take(self, optimizer: Any, loss: Tensor, again: Callable[[], Tensor]) -> None:
        """Take the step. loss: this rank's, such that the mean over ranks is the batch's. again: one more forward pass
        over this rank's share, giving its logits.
        """
        optimizer.step()


def alone(optimizer: Optimizer, model: nn.Module, world: World) -> Optimizer:
    """Make an optimizer that knows of one rank begin as rank 0 does and step by the mean gradient.

    Gradients are averaged in `step()`, or before it by `optimizer.average_gradients()`, for who must see their mean.
    FSDP averages those of a model that it has cut.
    """
    sharding = sharding_of(model, world)
    if sharding is not None:
        world.gather([OwnedTensor(buffer, 0) for buffer in model.buffers()])
        spread_to_replicas(sharding, world, model.parameters())
        return optimizer
    world.gather([OwnedTensor(tensor.detach(), 0) for tensor in (*model.parameters(), *model.buffers())])
    if world.size > 1:
        mean = Mean(optimizer, world)
        optimizer.register_step_pre_hook(mean.before_step)
        vars(optimizer).update(seconds=mean.seconds, average_gradients=mean.average)
    return optimizer


class Mean:
    """Averages an optimizer's gradients over ranks, once a step."""

    def __init__(self, optimizer: Optimizer, world: World) -> None:
        self.optimizer, self.world = optimizer, world
        self.seconds = {"messages": 0.0}
        self.done = False

    def average(self) -> None:
        """Average now; `step()` then sends nothing."""
        began = time.perf_counter()
        parameters = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
        self.world.mean([parameter.grad for parameter in parameters if parameter.grad is not None], "gradients")
        self.seconds["messages"] += time.perf_counter() - began
        self.done = True

    def before_step(self, *_: object) -> None:
        if not self.done:
            self.average()
        self.done = False


def positive(name: str, value: float) -> None:
    """Refuse zero, negative numbers and what is no number."""
    if not value > 0 or value == float("inf"):
        raise ValueError(f"{name}={value:g} must be a positive number; set --optimizer.{name}")
