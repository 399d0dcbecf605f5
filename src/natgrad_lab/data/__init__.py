"""Images in memory, and batches of them on every rank."""

from natgrad_lab.data.cifar import Cifar10, Cifar100
from natgrad_lab.data.images import Images, Source, Splits, hold_out, read_ahead
from natgrad_lab.data.imageset import ImageSet
from natgrad_lab.data.regularisation import Regularisation, Regulariser
from natgrad_lab.data.sampler import Sampler
from natgrad_lab.data.sklearn_digits import Digits
from natgrad_lab.data.text import Charlm, Stdlib

SOURCES: dict[str, type[Source]] = {
    "Charlm": Charlm,
    "Cifar10": Cifar10,
    "Cifar100": Cifar100,
    "Digits": Digits,
    "ImageSet": ImageSet,
    "Stdlib": Stdlib,
}
"""What --data takes."""

__all__ = [
    "SOURCES",
    "Charlm",
    "Cifar10",
    "Cifar100",
    "Digits",
    "ImageSet",
    "Images",
    "Regularisation",
    "Regulariser",
    "Sampler",
    "Source",
    "Splits",
    "Stdlib",
    "hold_out",
    "read_ahead",
]
