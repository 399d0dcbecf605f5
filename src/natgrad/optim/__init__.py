"""Optimizers: each a choice of curvature, staleness, direction, length and ranks."""

from natgrad.optim.base import SecondOrder
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
from natgrad.optim.change import LastStep, MeasuredChange, PredictedChange, measured_change, predicted_change
from natgrad.optim.checks import NatgradWarning
from natgrad.optim.fallback import Adam, adam
from natgrad.optim.kfac import KFAC
from natgrad.optim.lengths import plain, trust
from natgrad.optim.likelihoods import Bernoulli, Categorical, Normal
from natgrad.optim.metrics import DiagonalBFGS, Metric, SecondMoment
from natgrad.optim.nlcg import NLCG
from natgrad.optim.rules import Momentum, corrected, heavy_ball, tied
from natgrad.optim.search import CurvatureStep, Scheduled
from natgrad.optim.seng import SENG
from natgrad.optim.spngd import SPNGD

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
    "LastStep",
    "LayerBlocks",
    "MeasuredChange",
    "Metric",
    "Momentum",
    "NatgradWarning",
    "Normal",
    "PredictedChange",
    "Products",
    "Scheduled",
    "SecondMoment",
    "SecondOrder",
    "adam",
    "corrected",
    "dai_yuan",
    "fletcher_reeves",
    "hager_zhang",
    "heavy_ball",
    "hestenes_stiefel",
    "hs_dy",
    "kfac_blocks",
    "measured_change",
    "plain",
    "polak_ribiere",
    "predicted_change",
    "spngd_blocks",
    "tied",
    "trust",
]
