"""The hooks themselves: what the passes of a watched model hand to its capture.

Every hook keeps the capture weakly, and does nothing in a copy of the model (deepcopy, pickle, an average).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from natgrad.curvature.per_sample import Sample, scaled
from natgrad.layers.use import Form


class Watcher(Protocol):
    """Who takes in what hooks see: a Capture (capture.py)."""

    layers: Any
    seconds: float

    def clock(self) -> float: ...

    def called(self, index: int, form: Form, output: Tensor) -> Any: ...

    def arrived(self, call: Any, dy: Tensor) -> None: ...

    def told_apart(self, shared: Tensor, calls: Any, dy: Tensor) -> None: ...

    def deposited(self, index: int, place: int, gradient: Tensor) -> None: ...

    def handed(self, index: int) -> None: ...

    def begin(self, given: Any, inputs: Any) -> None: ...

    def enter(self) -> None: ...

    def leave(self) -> None: ...

    def end(self, logits: Any) -> Any: ...


class Hook:
    """What all hooks share."""

    def __init__(self, capture: Watcher):
        self.capture = weakref.ref(capture)

    def __deepcopy__(self, memo: dict) -> Inert:
        return Inert()

    def __reduce__(self) -> tuple:
        return Inert, ()


class Inert:
    """The hook in a copy of a watched model."""

    def __call__(self, *_: Any) -> None:
        return None


class LayerHook(Hook):
    """The forward hook of a layer that no function of torch tells of: what its module was given, and what it gave."""

    def __init__(self, capture: Watcher, index: int):
        super().__init__(capture)
        self.index = index

    def __call__(self, module: nn.Module, args: tuple, *rest: Any) -> None:
        capture, output = self.capture(), rest[-1]
        if capture is None or not isinstance(output, Tensor) or not output.requires_grad or transformed():
            return
        # without keywords only where garbage collection has removed the hook while torch was calling the hooks
        named = rest[0].values() if len(rest) > 1 else ()
        x = next((v for v in (*args, *named) if isinstance(v, Tensor)), None)
        if x is None:
            return
        start = capture.clock()
        call = capture.called(self.index, Form(capture.layers[self.index], x), output)
        capture.seconds += capture.clock() - start
        anchor(output).register_hook(Arrival(capture, call, output.shape))


def anchor(output: Tensor) -> Tensor:
    """The tensor whose hook hears of an output's gradient, whatever is done to the output in place.

    Where a function ends with a view of all that it has made, as a product of three dimensions does, an operation in
    place gives that another history, and the view's own hooks would hear of nothing.
    """
    base = output._base if output._is_view() else None
    if base is None or base.is_leaf or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output


class Arrival(Hook):
    """The hook of one call's output, of this shape: its gradient is known."""

    def __init__(self, capture: Watcher, call: Any, shape: torch.Size | None = None):
        super().__init__(capture)
        self.call, self.shape = call, shape

    def __call__(self, dy: Tensor | None) -> None:
        capture = self.capture()
        if dy is None or capture is None or transformed():  # no gradient: a wrapper passes on outputs that nobody uses
            return
        start = capture.clock()
        capture.arrived(self.call, dy if self.shape is None else dy.reshape(self.shape))
        capture.seconds += capture.clock() - start


class Apart(Hook):
    """The hook of the copies for samples of what some calls gave for all of them: each sample's gradient is known."""

    def __init__(self, capture: Watcher, shared: Tensor, calls: Any):
        super().__init__(capture)
        self.shared, self.calls = shared, calls

    def __call__(self, dy: Tensor) -> None:
        capture = self.capture()
        if capture is None or transformed():
            return
        start = capture.clock()
        capture.told_apart(self.shared, self.calls, dy.detach())
        capture.seconds += capture.clock() - start


class Deposit(Hook):
    """The hook of a parameter: autograd is about to add to its gradient."""

    def __init__(self, capture: Watcher, index: int, place: int):
        super().__init__(capture)
        self.index, self.place = index, place

    def __call__(self, gradient: Tensor) -> None:
        capture = self.capture()
        if capture is None or transformed():
            return
        start = capture.clock()
        capture.deposited(self.index, self.place, gradient)
        capture.seconds += capture.clock() - start


class Handed(Hook):
    """The hook of a sharded parameter: FSDP has added to its gradient what it has gathered from all ranks."""

    def __init__(self, capture: Watcher, index: int):
        super().__init__(capture)
        self.index = index

    def __call__(self, parameter: nn.Parameter) -> None:
        capture = self.capture()
        if capture is not None:
            capture.handed(self.index)


class Enter(Hook):
    """The forward pre-hook of a module with watched weights: functions are seen from here on."""

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if torch.is_grad_enabled() and (capture := self.capture()) is not None:
            capture.enter()


class Leave(Hook):
    """The forward hook of a module with watched weights."""

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if torch.is_grad_enabled() and (capture := self.capture()) is not None:
            capture.leave()


class Begin(Hook):
    """The forward pre-hook of the whole model.

    Without gradients nothing is watched, and nothing is asked that a compiler could not follow.
    """

    def __call__(self, module: nn.Module, args: tuple, *rest: Any) -> None:
        if torch.is_grad_enabled() and (capture := self.capture()) is not None:
            # without keywords only where garbage collection has removed the hook while torch was calling the hooks
            named = rest[0].values() if rest else ()
            inputs = [v for v in (*args, *named) if isinstance(v, Tensor)]
            capture.begin(next((len(v) for v in inputs if v.dim()), 0), inputs)
            capture.enter()


class End(Hook):
    """The forward hook of the whole model, whose output holds the logits."""

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not torch.is_grad_enabled() or (capture := self.capture()) is None:
            return
        capture.leave()
        logits = None
        for dims in (2, 1, 0):  # one number a sample, or a loss
            if logits is None and not transformed():
                logits = logits_of(output, dims)
        call = capture.end(logits)
        if logits is not None and call is not None:
            logits.register_hook(Arrival(capture, call))


def transformed() -> bool:
    """Whether a transform of torch.func is at work, whose tensors are not those of the pass."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[attr-defined]


def deposits(weight: Tensor) -> bool:
    """Whether the backward pass that runs now will add to the weight's gradient.

    Gradients of inputs (attacks, physics, saliency) do not, nor does `torch.autograd.grad` of weights.
    """
    if not weight.requires_grad:
        return False
    try:
        return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(weight).node)
    except RuntimeError:  # the gradient is captured for the caller of torch.autograd.grad
        return False


def logits_of(output: Any, dims: int = 2) -> Tensor | None:
    """The tensor of logits, of at least so many dimensions, in a model's output: its `logits`, or the first."""
    if isinstance(output, Tensor):
        return output if output.requires_grad and output.dim() >= dims else None
    if isinstance(output, Mapping):
        output = [output["logits"]] if "logits" in output else list(output.values())
    if isinstance(output, (tuple, list)):
        return next((found for item in output if (found := logits_of(item, dims)) is not None), None)
    return None


class LogitGradientScaling:
    """Divides each sample's gradients by the norm of its own logits' gradient (arXiv 2406.06420, eq. 14)."""

    def weigh(self, rows: Sample, squares: Tensor | None, samples: int) -> Sample:
        """Rows over the roots of `squares` [n]; the roots are how much of each row the mean gradient has."""
        if squares is None or len(squares) != samples:
            seen = "none were seen" if squares is None else f"they have {len(squares)} samples, a layer has {samples}"
            raise ValueError(
                'columns="improved" needs the gradients of the model\'s logits [samples, classes], first or named '
                f'logits among its outputs, but {seen}: return them, or take columns="empirical"'
            )
        root = squares[rows["chosen"]].sqrt()
        return {**scaled(rows, torch.where(root > 0, 1 / root, 0)), "mean": root}
