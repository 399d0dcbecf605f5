"""What a recipe can name as its optimizer: frozen numbers, and how to build the optimizer from them.

A new optimizer is one more class in a file of this folder and in OPTIMIZERS, or a class anywhere that the command line
is given by its import path; the command line learns its fields by itself.
"""

from natgrad_lab.train.optimizers.anybodys import Anybodys, anybodys
from natgrad_lab.train.optimizers.curved import KFac, SpNgd
from natgrad_lab.train.optimizers.layerwise import Lamb, Lars
from natgrad_lab.train.optimizers.matrices import Dash, Muon, Shampoo, Soap
from natgrad_lab.train.optimizers.nlcg import Nlcg
from natgrad_lab.train.optimizers.plain import AdamW, RmsProp, Sgd
from natgrad_lab.train.optimizers.seng import Seng
from natgrad_lab.train.optimizers.settings import Settings, alone, positive

OPTIMIZERS: dict[str, type[Settings]] = {
    "AdamW": AdamW,
    "Dash": Dash,
    "KFac": KFac,
    "Lamb": Lamb,
    "Lars": Lars,
    "Muon": Muon,
    "Nlcg": Nlcg,
    "RmsProp": RmsProp,
    "Seng": Seng,
    "Sgd": Sgd,
    "Shampoo": Shampoo,
    "Soap": Soap,
    "SpNgd": SpNgd,
}
"""What --optimizer takes."""

__all__ = [
    "OPTIMIZERS",
    "AdamW",
    "Anybodys",
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
    "anybodys",
    "positive",
]
