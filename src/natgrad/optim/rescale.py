"""Weights held at the norm they had at initialisation, so that a step's length keeps its meaning (SP-NGD eq. 24)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from natgrad.layers.layer import Layer

Rescale = Literal["always", "shrink"]


def he_norm(outputs: int) -> float:
    """The expected Frobenius norm of a weight under He's initialisation: sqrt(2 d_out), whatever the fan-in."""
    return math.sqrt(2 * outputs)


def rescale(weight: Tensor, layer: Layer, how: Rescale) -> None:
    """Bring a linear or convolutional weight to `he_norm`; with "shrink" (the release) only if it is above it.

    Biases, normalisations, embeddings and loose parameters stay as they are.
    """
    if layer.kind not in ("linear", "conv"):
        return
    factor = he_norm(layer.shape.blocks * layer.shape.out) / (torch.linalg.vector_norm(weight) + 1e-9)
    weight.mul_(factor if how == "always" else factor.clamp_max(1))
