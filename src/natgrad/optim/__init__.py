"""Optimizers: each a choice of curvature, staleness, direction, length and ranks."""

from natgrad.optim.base import SecondOrder
from natgrad.optim.blocks import LayerBlocks, kfac_blocks, spngd_blocks
from natgrad.optim.checks import NatgradWarning
from natgrad.optim.fallback import Adam, adam
from natgrad.optim.kfac import KFAC
from natgrad.optim.lengths import PredictedChange, plain, predicted_change, trust
from natgrad.optim.rules import Momentum, corrected, heavy_ball, tied
from natgrad.optim.seng import SENG
from natgrad.optim.spngd import SPNGD

__all__ = [
    "KFAC",
    "SENG",
    "SPNGD",
    "Adam",
    "LayerBlocks",
    "Momentum",
    "NatgradWarning",
    "PredictedChange",
    "SecondOrder",
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
