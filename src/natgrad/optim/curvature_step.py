"""The minimum along a direction, found with two more forward passes that leave no trace.

The Gauss-Newton model of the mean loss along d needs J = dz/dt, how the outputs z of w + t d move (Schraudolph 2002):

    d.G d = mean over samples of J^T H J,    J = (z(w + e d) - z(w - e d)) / 2e

Forward passes run without gradients, so that no wrapper sends any; parameters, buffers (BatchNorm's running statistics)
and random states are put back to the last bit, and both passes draw the same random numbers. Three numbers travel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from natgrad.optim.line_search import CurvatureStep, quadratic
from natgrad.parallel import World
from natgrad.readings import on_host

Forward = Callable[[], Tensor]


def minimum(
    search: CurvatureStep,
    model: nn.Module,
    forward: Forward | None,
    parts: Mapping[nn.Parameter, Tensor],
    decays: Sequence[float],
    fall: float,
    world: World,
    summed: bool,
    predictions: float | None = None,
) -> float:
    """The factor on d = -parts at which the model of the loss is least, the same on every rank.

    forward: None on a rank that has run out of batches. decays: each parameter's weight_decay. fall: -g.d. summed: the
    loss is a sum over a rank's samples, not a mean. predictions: so many of a sample does the mean loss average; None:
    all places of its logits.
    """
    check_precision(parts)
    bent, length = torch.zeros(3, dtype=torch.float64), norm(parts.values())
    if forward is not None and length > 0 and math.isfinite(length):
        e = search.probe * max(norm([p.detach() for p in parts]), 1e-12) / length
        with untouched(model, parts):
            with replayed(parts):
                high = outputs(forward, parts, -e)  # w + e d, as d = -parts
            low = outputs(forward, parts, 2 * e)
        value = quadratic(search.output, (high + low) / 2, (high - low) / (2 * e))
        squares = torch.cat(on_host(torch._foreach_norm(list(parts.values())))).square()
        ridge = float(squares @ (torch.tensor(decays, dtype=torch.float64) + search.mu))
        bent = torch.tensor(
            [float(value), averaged(search, high, predictions), ridge / world.size], dtype=torch.float64
        )
    world.sum([bent], "scalars")
    total, samples, ridge = bent.tolist()
    mean = total / max(samples, 1.0)
    curvature = (total / world.size if summed else mean) + ridge
    if not (math.isfinite(curvature) and curvature > 0 and fall > 0):
        return 0.0
    return min(fall / curvature, search.longest(mean))


def averaged(search: CurvatureStep, output: Tensor, predictions: float | None) -> float:
    """How many terms the mean loss of this output has."""
    if predictions is not None:
        return len(output) * predictions
    return output.numel() / output.shape[1] if search.output == "softmax" else float(len(output))


def outputs(forward: Forward, parts: Mapping[nn.Parameter, Tensor], shift: float) -> Tensor:
    """What the model gives with its parameters moved by `shift` parts, in double precision."""
    for parameter, part in parts.items():
        parameter.add_(part.to(parameter.dtype), alpha=shift)
    kinds = {parameter.device.type for parameter in parts} - {"meta"}
    before = {kind: torch.is_autocast_enabled(kind) for kind in kinds}
    for kind in kinds:
        torch.set_autocast_enabled(kind, False)
    try:
        try:
            found = forward()
        except RuntimeError as error:  # an output that is made of derivatives of the network
            if "does not require grad" not in str(error):
                raise
            with torch.enable_grad():
                found = forward()
        found = found.detach() if isinstance(found, Tensor) else found
    finally:
        for kind, enabled in before.items():
            torch.set_autocast_enabled(kind, enabled)
    if not isinstance(found, Tensor) or found.dtype in (torch.bfloat16, torch.float16):
        kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"forward() gave {kind}: return the model's output in float32, computed outside of autocast")
    return found.double()


@contextmanager
def untouched(model: nn.Module, parts: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Inside, parameters and buffers may change and random numbers be drawn: all is put back."""
    kept = [(t, t.detach().clone()) for t in (*parts, *model.buffers())]
    try:
        with replayed(parts):
            yield
    finally:
        for tensor, value in kept:
            tensor.copy_(value)


def replayed(parts: Mapping[nn.Parameter, Tensor]) -> AbstractContextManager[None]:
    """Random numbers drawn inside are drawn again afterwards."""
    return torch.random.fork_rng(sorted({p.device.index or 0 for p in parts if p.device.type == "cuda"}))


def check_precision(parts: Mapping[nn.Parameter, Tensor]) -> None:
    """A shift by a thousandth is lost in half precision."""
    for parameter in parts:
        if parameter.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"CurvatureStep() moves weights by a thousandth, which {parameter.dtype} cannot hold: keep the model "
                "in float32 under autocast, or take step=Scheduled()"
            )


def norm(tensors: Iterable[Tensor]) -> float:
    """The Euclidean norm of all together."""
    return torch.cat(on_host(torch._foreach_norm(list(tensors)))).norm().item()
