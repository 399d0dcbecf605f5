"""natgrad: second-order training with very large mini-batches, on unmodified PyTorch models."""

import warnings
from typing import Any

from natgrad.curvature import (
    CountSketch,
    Diagonal,
    EigenKronecker,
    Full,
    Gaussian,
    Identity,
    Kronecker,
    Legacy,
    RowNorm,
    SampleSpace,
    Sketch,
    Uniform,
    UnitWise,
)
from natgrad.optim import (
    KFAC,
    NLCG,
    SENG,
    SPNGD,
    Adam,
    Bernoulli,
    Categorical,
    CurvatureStep,
    DiagonalBFGS,
    KLClip,
    LastStep,
    LayerBlocks,
    MeasuredChange,
    Metric,
    Momentum,
    NatgradWarning,
    Normal,
    Preconditioner,
    Products,
    Scheduled,
    SecondMoment,
    SecondOrder,
    adam,
    corrected,
    dai_yuan,
    decay_groups,
    fletcher_reeves,
    hager_zhang,
    heavy_ball,
    hestenes_stiefel,
    hs_dy,
    kfac_blocks,
    kl_clip,
    measured_change,
    plain,
    polak_ribiere,
    spngd_blocks,
    tied,
    trust,
)
from natgrad.parallel import World
from natgrad.refresh import Adaptive, Budget, Every, Staleness

__version__ = "0.1.0"

RENAMED = {"PredictedChange": "KLClip", "predicted_change": "kl_clip"}
"""Names of the version before, which warn in this one."""


def __getattr__(name: str) -> Any:
    if name not in RENAMED:
        raise AttributeError(f"module 'natgrad' has no attribute {name!r}")
    warnings.warn(f"natgrad.{name} is now natgrad.{RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return globals()[RENAMED[name]]


__all__ = [
    "KFAC",
    "NLCG",
    "SENG",
    "SPNGD",
    "Adam",
    "Adaptive",
    "Bernoulli",
    "Budget",
    "Categorical",
    "CountSketch",
    "CurvatureStep",
    "Diagonal",
    "DiagonalBFGS",
    "EigenKronecker",
    "Every",
    "Full",
    "Gaussian",
    "Identity",
    "KLClip",
    "Kronecker",
    "LastStep",
    "LayerBlocks",
    "Legacy",
    "MeasuredChange",
    "Metric",
    "Momentum",
    "NatgradWarning",
    "Normal",
    "Preconditioner",
    "Products",
    "RowNorm",
    "SampleSpace",
    "Scheduled",
    "SecondMoment",
    "SecondOrder",
    "Sketch",
    "Staleness",
    "Uniform",
    "UnitWise",
    "World",
    "adam",
    "corrected",
    "dai_yuan",
    "decay_groups",
    "fletcher_reeves",
    "hager_zhang",
    "heavy_ball",
    "hestenes_stiefel",
    "hs_dy",
    "kfac_blocks",
    "kl_clip",
    "measured_change",
    "plain",
    "polak_ribiere",
    "spngd_blocks",
    "tied",
    "trust",
]
