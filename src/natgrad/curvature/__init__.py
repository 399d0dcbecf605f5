"""What a layer's curvature looks like: pure functions over its statistics."""

from natgrad.curvature.curvature import Cost, Curvature, Draw, Extent, Moment, Statistic
from natgrad.curvature.eigen import EigenKronecker
from natgrad.curvature.full import Full
from natgrad.curvature.identity import Identity
from natgrad.curvature.kronecker import Kronecker
from natgrad.curvature.legacy import Legacy
from natgrad.curvature.per_sample import Rows
from natgrad.curvature.sample_space import SampleSpace
from natgrad.curvature.sketch import CountSketch, Sketch, Uniform
from natgrad.curvature.unitwise import UnitWise

__all__ = [
    "Cost",
    "CountSketch",
    "Curvature",
    "Draw",
    "EigenKronecker",
    "Extent",
    "Full",
    "Identity",
    "Kronecker",
    "Legacy",
    "Moment",
    "Rows",
    "SampleSpace",
    "Sketch",
    "Statistic",
    "Uniform",
    "UnitWise",
]
