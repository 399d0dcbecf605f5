"""What a layer's curvature looks like: pure functions over its statistics."""

from natgrad.curvature.base import Cost, Curvature, Draw, Moment
from natgrad.curvature.diagonal import Diagonal
from natgrad.curvature.eigen import EigenKronecker
from natgrad.curvature.full import Full
from natgrad.curvature.identity import Identity
from natgrad.curvature.kronecker import Kronecker
from natgrad.curvature.unitwise import UnitWise

__all__ = [
    "Cost",
    "Curvature",
    "Diagonal",
    "Draw",
    "EigenKronecker",
    "Full",
    "Identity",
    "Kronecker",
    "Moment",
    "UnitWise",
]
