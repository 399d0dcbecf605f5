"""natgrad: second-order training with very large mini-batches, on unmodified PyTorch models.

The names here are what a training script needs. Parts to build with are in `natgrad.curvature` (Kronecker, UnitWise,
SampleSpace, sketches), `natgrad.optim` (betas, coefficients of momentum, fallbacks, likelihoods) and `natgrad.refresh`.
"""

import warnings
from typing import Any

from natgrad import curvature, optim, refresh
from natgrad.optim import (
    KFAC,
    NLCG,
    SENG,
    SPNGD,
    CurvatureStep,
    DiagonalBFGS,
    KLClip,
    LayerBlocks,
    MeasuredChange,
    Momentum,
    NatgradWarning,
    Preconditioner,
    Scheduled,
    SecondMoment,
    SecondOrder,
    decay_groups,
    kfac_blocks,
    plain,
    spngd_blocks,
    trust,
)
from natgrad.parallel import World
from natgrad.refresh import Adaptive, Budget, Every

__version__ = "0.1.0"

RENAMED = {"PredictedChange": "KLClip", "predicted_change": "optim.kl_clip"}
"""Names of the version before, which warn in this one."""
MOVED = {
    curvature: (
        "CountSketch",
        "EigenKronecker",
        "Full",
        "Identity",
        "Kronecker",
        "Legacy",
        "SampleSpace",
        "Sketch",
        "Uniform",
        "UnitWise",
    ),
    optim: (
        "Adam",
        "adam",
        "Bernoulli",
        "Categorical",
        "Normal",
        "LastStep",
        "Metric",
        "Products",
        "corrected",
        "dai_yuan",
        "fletcher_reeves",
        "hager_zhang",
        "heavy_ball",
        "hestenes_stiefel",
        "hs_dy",
        "kl_clip",
        "measured_change",
        "polak_ribiere",
        "tied",
    ),
    refresh: ("Staleness",),
}
"""Names that stood here in the version before, by the module where they are."""


def __getattr__(name: str) -> Any:
    for module, names in MOVED.items():
        if name in names:
            warnings.warn(f"natgrad.{name} is now {module.__name__}.{name}", DeprecationWarning, stacklevel=2)
            return getattr(module, name)
    if name not in RENAMED:
        raise AttributeError(f"module 'natgrad' has no attribute {name!r}")
    warnings.warn(f"natgrad.{name} is now natgrad.{RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return getattr(optim, RENAMED[name].rpartition(".")[2])


__all__ = [
    "KFAC",
    "NLCG",
    "SENG",
    "SPNGD",
    "Adaptive",
    "Budget",
    "CurvatureStep",
    "DiagonalBFGS",
    "Every",
    "KLClip",
    "LayerBlocks",
    "MeasuredChange",
    "Momentum",
    "NatgradWarning",
    "Preconditioner",
    "Scheduled",
    "SecondMoment",
    "SecondOrder",
    "World",
    "decay_groups",
    "kfac_blocks",
    "plain",
    "spngd_blocks",
    "trust",
]
