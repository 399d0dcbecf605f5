"""What a layer's curvature looks like: pure functions over its statistics."""

from natgrad.curvature.base import Cost, Curvature, Draw, Moment, Seen, Statistic
from natgrad.curvature.diagonal import Diagonal
from natgrad.curvature.eigen import EigenKronecker
from natgrad.curvature.full import Full
from natgrad.curvature.identity import Identity
from natgrad.curvature.kronecker import Kronecker
from natgrad.curvature.legacy import Legacy
from natgrad.curvature.rows import Rows
from natgrad.curvature.samplespace import SampleSpace
from natgrad.curvature.sketching import CountSketch, Gaussian, RowNorm, Sketch, Uniform
from natgrad.curvature.unitwise import UnitWise

__all__ = [
    "Cost",
    "CountSketch",
    "Curvature",
    "Diagonal",
    "Draw",
    "EigenKronecker",
    "Full",
    "Gaussian",
    "Identity",
    "Kronecker",
    "Legacy",
    "Moment",
    "RowNorm",
    "Rows",
    "SampleSpace",
    "Seen",
    "Sketch",
    "Statistic",
    "Uniform",
    "UnitWise",
]
