"""natgrad: second-order training with very large mini-batches, on unmodified PyTorch models."""

from natgrad.curvature import Diagonal, Identity, Kronecker, UnitWise
from natgrad.optim import (
    KFAC,
    SPNGD,
    Adam,
    Momentum,
    NatgradWarning,
    PredictedChange,
    SecondOrder,
    adam,
    corrected,
    heavy_ball,
    plain,
    predicted_change,
    tied,
    trust,
)
from natgrad.parallel import World
from natgrad.staleness import Adaptive, Every, Staleness

__version__ = "0.1.0"

__all__ = [
    "KFAC",
    "SPNGD",
    "Adam",
    "Adaptive",
    "Diagonal",
    "Every",
    "Identity",
    "Kronecker",
    "Momentum",
    "NatgradWarning",
    "PredictedChange",
    "SecondOrder",
    "Staleness",
    "UnitWise",
    "World",
    "adam",
    "corrected",
    "heavy_ball",
    "plain",
    "predicted_change",
    "tied",
    "trust",
]
