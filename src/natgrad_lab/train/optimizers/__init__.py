"""What a recipe can name as its optimizer: frozen numbers, and how to build the optimizer from them.

A new optimizer is one more class in a file of this folder, or in any module that a recipe imports; the command line
learns its fields by itself.
"""

from natgrad_lab.train.optimizers.curved import KFac, SpNgd
from natgrad_lab.train.optimizers.layerwise import Lamb, Lars
from natgrad_lab.train.optimizers.matrices import Dash, Muon, Shampoo, Soap
from natgrad_lab.train.optimizers.nlcg import Nlcg
from natgrad_lab.train.optimizers.plain import AdamW, RmsProp, Sgd
from natgrad_lab.train.optimizers.seng import Seng
from natgrad_lab.train.optimizers.settings import Settings, alone, positive

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
