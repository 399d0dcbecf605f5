"""Optimizers: each a choice of curvature, staleness, direction, length and ranks."""

from natgrad.optim.betas import (
    Products,
    dai_yuan,
    fletcher_reeves,
    hager_zhang,
    hestenes_stiefel,
    hs_dy,
    polak_ribiere,
)
from natgrad.optim.blocks import LayerBlocks, kfac_blocks, spngd_blocks
from natgrad.optim.diagonal_metrics import DiagonalBFGS, Metric, SecondMoment
from natgrad.optim.directions import Momentum, corrected, heavy_ball, tied
from natgrad.optim.fallback import Adam, adam
from natgrad.optim.kfac import KFAC
from natgrad.optim.kl_clip import KLClip, LastStep, MeasuredChange, kl_clip, measured_change
from natgrad.optim.likelihoods import Bernoulli, Categorical, Normal
from natgrad.optim.line_search import CurvatureStep, Scheduled
from natgrad.optim.nlcg import NLCG
from natgrad.optim.param_groups import decay_groups
from natgrad.optim.preconditioner import Preconditioner
from natgrad.optim.second_order import SecondOrder
from natgrad.optim.seng import SENG
from natgrad.optim.spngd import SPNGD
from natgrad.optim.step_size import plain, trust
from natgrad.optim.validation import NatgradWarning

__all__ = [
    "KFAC",
    "NLCG",
    "SENG",
    "SPNGD",
    "Adam",
    "Bernoulli",
    "Categorical",
    "CurvatureStep",
    "DiagonalBFGS",
    "KLClip",
    "LastStep",
    "LayerBlocks",
    "MeasuredChange",
    "Metric",
    "Momentum",
    "NatgradWarning",
    "Normal",
    "Preconditioner",
    "Products",
    "Scheduled",
    "SecondMoment",
    "SecondOrder",
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
