"""Arguments that the optimizers share, declared once: types for checkers and editors, complete signatures for help."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypedDict

from natgrad.optim.fallback import Fallback
from natgrad.optim.rescale import Rescale
from natgrad.refresh import Staleness


class Shared(TypedDict, total=False):
    """What every optimizer and the Preconditioner take.

    Attributes:
        params: parameters, named parameters or torch's groups; None takes all that require gradients. A group may set
            lr, momentum, weight_decay, damping and refresh.
        reduction: reduction of the loss, "mean" or "sum"; None is a mean.
        predictions: how many predictions of a sample a mean loss averages: one class of an image, all places of a text.
            None counts the rows of logits that have a gradient.
        batch_dim: where samples are in inputs of several dimensions, for all modules or by name. None: first, or as
            `batch_first` of the modules around says.
        scaler: a GradScaler, if you unscale gradients yourself, call average_gradients() or overlap messages.
        strict: refuse parameters without curvature, instead of training them by the fallback.
        seed: decides which rows are measured and which labels are drawn.
        world: a natgrad.World, a process group, or None for all ranks.

    """

    params: Iterable[Any] | None
    reduction: Literal["mean", "sum"] | None
    predictions: float | None
    batch_dim: int | Mapping[str, int] | None
    scaler: Any
    strict: bool
    seed: int
    world: Any


class SharedByOptimizers(Shared, total=False):
    """What optimizers take that make steps of their own.

    Attributes:
        max_norm: norm to which the mean gradient of all parameters is clipped; None: no clipping.
        graph: on GPUs, record the launches of a step in which nothing is measured once and make them again as CUDA
            graphs. One gradient more stays in memory.

    """

    max_norm: float | None
    graph: bool


class SharedByNaturalGradients(SharedByOptimizers, total=False):
    """What SPNGD, KFAC and SENG take.

    Attributes:
        fallback: direction of parameters without curvature.
        rescale: hold weights at their He norm: "always" (SP-NGD, eq. 24), or "shrink" those that have grown (its
            release); None leaves them.
        gather: what owners send to everyone: new weights, or "directions" that every rank applies.

    """

    fallback: Fallback
    rescale: Rescale | None
    gather: Literal["weights", "directions"]


class SharedByFactors(SharedByNaturalGradients, total=False):
    """What SPNGD and KFAC take.

    Attributes:
        max_size: a side of a layer with more dimensions keeps the diagonal of its factor only.

    """

    max_size: int


class SharedByPreconditioners(Shared, total=False):
    """What the Preconditioner takes.

    Attributes:
        max_size: a side of a layer with more dimensions keeps the diagonal of its factor only.

    """

    max_size: int


class OfNlcg(SharedByOptimizers, total=False):
    """What NLCG takes; those below and predictions, batch_dim, strict and seed belong to a curvature as preconditioner.

    Attributes:
        damping: with a curvature as preconditioner: lambda > 0 of F + lambda I, in units of squared per-sample
            gradients.
        refresh: with a curvature as preconditioner: a Staleness, or a whole number of steps between measurements.
        rows_per_dim: with a curvature as preconditioner, but not SampleBlocks: rows measured for each dimension of a
            statistic; None measures all.
        ema_decay: with a curvature as preconditioner: share of the old average that a measurement keeps.
        fisher: with a curvature as preconditioner: "empirical" or "sampled" labels.
        max_size: with a curvature as preconditioner: a side of a layer with more dimensions keeps the diagonal of its
            factor only.

    """

    damping: float
    refresh: int | Staleness
    rows_per_dim: int | None
    ema_decay: float
    fisher: Literal["empirical", "sampled"]
    max_size: int


def signature_of(kind: type, more: Iterable[inspect.Parameter]) -> inspect.Signature:
    """The signature of a class with what its constructor's `**shared` stands for written out, keyword by keyword."""
    signature = inspect.signature(kind.__init__)
    own = [p for p in signature.parameters.values() if p.name != "self"]
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own):
        own = [p for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD]
        names = {p.name for p in own}
        own += [p for p in more if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name not in names]
    return signature.replace(parameters=own, return_annotation=inspect.Signature.empty)


def keywords(shared: type, defaults: Mapping[str, Any]) -> list[inspect.Parameter]:
    """The keys of one of the classes above as parameters of a function."""
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=kind)
        for name, kind in shared.__annotations__.items()
    ]
