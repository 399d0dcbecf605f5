"""natgrad: second-order training with very large mini-batches, on unmodified PyTorch models."""

from natgrad.curvature import Diagonal, EigenKronecker, Full, Identity, Kronecker, UnitWise
from natgrad.optim import (
    KFAC,
    SPNGD,
    Adam,
    LayerBlocks,
    Momentum,
    NatgradWarning,
    PredictedChange,
    SecondOrder,
    adam,
    corrected,
    heavy_ball,
    kfac_blocks,
    plain,
    predicted_change,
    spngd_blocks,
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
    "EigenKronecker",
    "Every",
    "Full",
    "Identity",
    "Kronecker",
    "LayerBlocks",
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
    "kfac_blocks",
    "plain",
    "predicted_change",
    "spngd_blocks",
    "tied",
    "trust",
]
