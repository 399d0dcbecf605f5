"""Running means of the weights, by which a model is judged instead of its last ones.

    mean <- c mean + (1 - c) w,   c = min(share, (1 + n) / (10 + n)) after n steps

The ramp is TensorFlow's (ExponentialMovingAverage with num_updates): of 600 steps the mean spans some 70.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from natgrad.parallel import local_of


class Average:
    """The means of a model's parameters. `share` None: none are kept, and the model is judged as it is."""

    def __init__(self, model: nn.Module, share: float | None) -> None:
        self.share = share
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.means = [] if share is None else [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Take in the weights after so many steps."""
        if self.share is not None:
            kept = min(self.share, (1 + step) / (10 + step))
            means, weights = ([local_of(t) for t in tensors] for tensors in (self.means, self.parameters))
            torch._foreach_lerp_(means, weights, 1 - kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the means for its weights; afterwards its own again, to the last bit."""
        own = [p.detach().clone() for p in self.parameters] if self.means else []
        self._set(self.means)
        try:
            yield
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values):
            parameter.copy_(value)
