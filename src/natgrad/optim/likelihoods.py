"""Labels drawn from a model's own prediction, for the true Fisher (SP-NGD section 3.2: one Monte Carlo sample).

The Fisher of a model is the curvature of -log p(y | output) with y drawn from p. The loss decides what p is: cross
entropy means a categorical distribution, a squared error a normal one, binary cross entropy with logits a Bernoulli.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from natgrad.capture import Capture
from natgrad.generators import generator_on
from natgrad.layers.layer import promote


class Likelihood(Protocol):
    """A distribution of labels given the output of a model."""

    name: str

    def __call__(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of labels drawn from the prediction, for every prediction: the first dimension is samples."""
        ...


@dataclass(frozen=True)
class Categorical:
    """One of the classes, by the softmax of logits [n, classes, ...]: a loss for each of the places [n, ...]."""

    name: str = "categorical"

    @staticmethod
    def check(output: Tensor) -> None:
        """Refuse what is not logits."""
        if output.dim() < 2 or output.shape[1] < 2:
            raise ValueError(
                f"sample(output) of shape {tuple(output.shape)}: a softmax needs logits [samples, classes, ...] of two "
                'classes or more; for one logit say likelihood="bernoulli", for regression likelihood="normal"'
            )

    def __call__(self, output: Tensor, generator: torch.Generator) -> Tensor:
        self.check(output)
        logits = promote(output).movedim(1, -1)
        noise = torch.rand(logits.shape, generator=generator, device=logits.device)
        labels = (logits.detach() - noise.log().neg().log()).argmax(-1)  # Gumbel's way of drawing from a softmax
        losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        return losses.view(labels.shape)


@dataclass(frozen=True)
class Bernoulli:
    """Yes or no for every logit [n, ...], as binary_cross_entropy_with_logits reads them."""

    name: str = "bernoulli"

    def __call__(self, output: Tensor, generator: torch.Generator) -> Tensor:
        logits = promote(output)
        noise = torch.rand(logits.shape, generator=generator, device=logits.device)
        labels = (noise < logits.detach().sigmoid()).to(logits)
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none")


@dataclass(frozen=True)
class Normal:
    """Targets around the output [n, ...] with a known variance: half of the squared error over the variance."""

    variance: float = 1.0
    name: str = "normal"

    def __post_init__(self):
        if not self.variance > 0:
            raise ValueError(f"Normal(variance={self.variance!r}): give a number above 0")

    def __call__(self, output: Tensor, generator: torch.Generator) -> Tensor:
        mean = promote(output)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        target = mean.detach() + self.variance**0.5 * noise
        return (mean - target).square() / (2 * self.variance)


LIKELIHOODS: dict[str, Any] = {made.name: made for made in (Categorical(), Bernoulli(), Normal())}


def draw_labels(
    capture: Capture,
    output: Any,
    likelihood: Likelihood | str | Callable[[Any], Tensor] | None,
) -> None:
    """Measure the curvature of labels that are drawn from the output, where something is to be measured.

    The outputs of a Bernoulli's or a normal sample are one prediction: their losses add up, as in a likelihood.
    """
    if isinstance(likelihood, str):
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood={likelihood!r}: give one of {', '.join(LIKELIHOODS)}, or a function")
        likelihood = LIKELIHOODS[likelihood]
    if likelihood is None:
        likelihood = LIKELIHOODS["categorical"]
        if not isinstance(output, Tensor):
            raise ValueError(
                f"sample(output) got {type(output).__name__}: pass the logits, or a function as likelihood= that draws "
                "labels for all outputs and gives each sample's loss"
            )
    if isinstance(likelihood, Categorical):
        likelihood.check(output)  # in every step, whether or not it measures
    if not capture.wants_labels:
        return
    with torch.enable_grad():
        if isinstance(likelihood, (Categorical, Bernoulli, Normal)):
            generator = generator_on(output.device, capture.seed_of_labels())
            losses = likelihood(output, generator)
        else:
            losses = likelihood(output)  # type: ignore[call-arg]
            if not isinstance(losses, Tensor) or losses.dim() == 0:
                given = "one number" if isinstance(losses, Tensor) else type(losses).__name__
                raise ValueError(f"likelihood= gave {given}: give each sample's loss, a tensor [samples, ...]")
        made = losses.numel() if isinstance(likelihood, Categorical) else len(losses)
        capture.sample(losses.sum(), float(made))
