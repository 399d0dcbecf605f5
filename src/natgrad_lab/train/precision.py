"""In which type a network computes: autocast around forward passes, torch's GradScaler around a step in float16.

float16 ends at 65,504 and rounds gradients below 6e-8 to zero, so the loss is multiplied by a scale S before the
backward pass and gradients are divided by it after. Where one is not finite on any rank, all ranks leave the step out
and S falls. bfloat16 has float32's range and needs nothing of this. Weights, statistics and updates stay in float32.
"""

import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from natgrad.optim.second_order import SecondOrder
from natgrad.parallel import World, fsdp_modules

Kind = Literal["float32", "bfloat16", "float16"]
KINDS: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
VARIANTS = 8
"""Graphs of one module: for training, for evaluations, for the last part of a share. It is torch's own limit."""


class Precision:
    """The type of one run's forward and backward passes on one device."""

    def __init__(self, kind: Kind, device: torch.device, world: World) -> None:
        self.dtype, self.device, self.world = KINDS[kind], device, world
        self.scaler = GradScaler(device.type) if kind == "float16" else None

    def __call__(self, optimizer: Optimizer) -> Optimizer:
        """Make the scale known to a second-order optimizer, which also reads gradients before its step."""
        if isinstance(optimizer, SecondOrder) and self.scaler is not None:
            optimizer.scaler = self.scaler
        return optimizer

    def autocast(self) -> AbstractContextManager[Any]:
        """Inside, matrix products and convolutions are in the run's type; cross entropy is not."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)

    def forward(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return the logits, in float32 at least."""
        with self.autocast():
            output = model(inputs)
        return output if output.dtype == torch.float64 else output.float()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a part's loss, times S where there is one."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def stepper(self, optimizer: Optimizer) -> Any:
        """Return what has the optimizer's `step()`: itself, or it behind the scaler."""
        return optimizer if self.scaler is None else Scaled(optimizer, self.scaler, self.world)


class Scaled:
    """An optimizer whose step is left out on all ranks where any gradient is not finite, at a scale equal on all."""

    def __init__(self, optimizer: Optimizer, scaler: GradScaler, world: World) -> None:
        self.optimizer, self.scaler, self.world = optimizer, scaler, world

    @property
    def hears_loss(self) -> bool:
        """Whether the optimizer wants to be told the loss, unscaled."""
        return getattr(self.optimizer, "hears_loss", False)

    def step(self, **told: Any) -> None:
        average = (
            None if isinstance(self.optimizer, SecondOrder) else getattr(self.optimizer, "average_gradients", None)
        )
        if average is not None:
            average()  # the scaler must judge the mean: one rank's overflow is then everybody's
        self.scaler.step(self.optimizer, **told)
        self.scaler.update()
        self._agree()

    def _agree(self) -> None:
        """Take the smallest scale and count of any rank: a second-order step finds overflows rank by rank."""
        if self.world.size == 1:
            return
        state = self.scaler.state_dict()
        mine = torch.tensor([-state["scale"], -state["_growth_tracker"]], dtype=torch.float64)
        self.world.max([mine], "scalars")
        scale, tracker = (-mine).tolist()
        if (scale, tracker) != (state["scale"], state["_growth_tracker"]):
            self.scaler.load_state_dict({**state, "scale": scale, "_growth_tracker": int(tracker)})


def arrange(model: nn.Module, channels_last: bool, compiled: bool, device: torch.device) -> nn.Module:
    """Lay out the weights, and compile the model in place, so that its parameters keep their names."""
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compiled:
        check_compiler(device)
        compile_forward(model)
    return model


def compile_forward(model: nn.Module) -> None:
    """Compile the forward method of a model; of one that is cut over ranks, each block's and that of the rest.

    Not `model.compile()`: it would put FSDP's hooks, which gather parameters, inside of the graph, and compile nothing
    of a Sequential, because torch follows no forward method of its own modules from there.
    """
    modules = list(fsdp_modules(model).values()) or [model]
    limit = VARIANTS * len(modules)  # blocks of one class have one forward method, hence one limit
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, limit)
    for module in modules:
        module.forward = torch.compile(module.forward)  # type: ignore[method-assign]


def check_compiler(device: torch.device) -> None:
    """Raise ValueError where torch.compile would find no C++ compiler on a CPU."""
    found = any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++") if name)
    if device.type == "cpu" and not found:
        raise ValueError("compile=True on a CPU needs a C++ compiler, and none is found; install g++ or leave it out")
