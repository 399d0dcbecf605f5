"""What a recipe can name as its optimizer: frozen numbers, and how to build the optimizer from them.

A new optimizer is one more class in a file of this folder, or in any module that a recipe imports; the command line
learns its fields by itself.
"""

from natgrad.train.optimizers.base import Settings, alone, positive
from natgrad.train.optimizers.curved import KFac, SpNgd
from natgrad.train.optimizers.layerwise import Lamb, Lars
from natgrad.train.optimizers.matrices import Dash, Muon, Shampoo, Soap
from natgrad.train.optimizers.nlcg import Nlcg
from natgrad.train.optimizers.plain import AdamW, RmsProp, Sgd
from natgrad.train.optimizers.seng import Seng

__all__ = [
    "AdamW",
    "Dash",
    "KFac",
    "Lamb",
    "Lars",
    "Muon",
    "Nlcg",
    "RmsProp",
    "Seng",
    "Settings",
    "Sgd",
    "Shampoo",
    "Soap",
    "SpNgd",
    "alone",
    "positive",
]
