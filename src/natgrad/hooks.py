"""The hooks themselves: what a layer's forward and backward passes hand to the capture that watches them."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from natgrad.curvature.rows import Sample, scaled

if TYPE_CHECKING:
    from natgrad.capture import Capture

TOGETHER = -2  # the "layer" by which all layers draw the same samples


class LayerHook:
    """The forward hook of one layer. In a copy of the model (deepcopy, pickle, an average) it does nothing."""

    def __init__(self, capture: Capture, index: int):
        self.capture = weakref.ref(capture)
        self.index = index

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        capture, index = self.capture(), self.index
        if capture is None or not isinstance(output, Tensor) or not output.requires_grad:
            return
        start = time.perf_counter()
        layer, watch = capture.layers[index], capture.watches.get(index)
        x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        samples, places = layer.count(x)
        draw = capture.sampler.draw(index, capture.calls[index], x.device)
        capture.calls[index] += 1
        kept = []
        if watch:
            common = capture.sampler.draw(TOGETHER, 0, x.device)
            with torch.no_grad():
                x = x.detach()
                kept = [(m, m.before(layer, x, common if m.together else draw, output)) for m in watch.moments]
        capture.seconds += time.perf_counter() - start

        def arrived(dy: Tensor) -> None:
            if capture.edges is not None and not capture.inside:
                return
            start = time.perf_counter()
            task = outer if outer >= 0 else torch._C._current_graph_task_id()
            capture.predicted(samples * places, task)
            parts = {}
            if kept:
                with torch.no_grad():
                    dy = dy.detach()
                    parts = {m.key: m.after(layer, k, dy, draw) for m, k in kept}
            capture.saw(index, samples, parts, task)
            capture.seconds += time.perf_counter() - start

        outer = torch._C._current_graph_task_id()  # not -1: recomputed within a backward pass, as part of it
        output.register_hook(arrived)
        if capture.edges is not None:
            capture.edges.append(torch.autograd.graph.get_gradient_edge(output))
            capture.seen[index] = samples

    def __deepcopy__(self, memo: dict) -> Inert:
        return Inert()

    def __reduce__(self) -> tuple:
        return Inert, ()


class Inert:
    """The hook in a copy of a watched model."""

    def __call__(self, *_: Any) -> None:
        return None


class LogitsHook:
    """The forward hook of the whole model: how many predictions it makes, and how steep the loss is at them."""

    def __init__(self, capture: Capture):
        self.capture = weakref.ref(capture)

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        capture = self.capture()
        logits = logits_of(output)
        if logits is None:
            logits = logits_of(output, 1)  # one number a sample
        if capture is None or logits is None:
            return

        def arrived(dy: Tensor) -> None:
            if capture.edges is not None and not capture.inside:
                return
            task = torch._C._current_graph_task_id()
            if dy.dim() < 3:
                capture.predicted(len(dy), task)
            if capture.judged is not None and dy.dim() > 1:
                squares = dy.detach().float() if dy.dtype in (torch.float16, torch.bfloat16) else dy.detach()
                capture.sharp(squares.flatten(1).square().sum(1), task)

        logits.register_hook(arrived)

    def __deepcopy__(self, memo: dict) -> Inert:
        return Inert()

    def __reduce__(self) -> tuple:
        return Inert, ()


def logits_of(output: Any, dims: int = 2) -> Tensor | None:
    """The tensor of logits, of at least so many dimensions, in a model's output: its `logits`, or the first."""
    if isinstance(output, Tensor):
        return output if output.requires_grad and output.dim() >= dims else None
    if isinstance(output, Mapping):
        output = [output["logits"]] if "logits" in output else list(output.values())
    if isinstance(output, (tuple, list)):
        return next((found for item in output if (found := logits_of(item, dims)) is not None), None)
    return None


class Judge:
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
