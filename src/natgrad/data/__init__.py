"""Images in memory, and batches of them on every rank."""

from natgrad.data.cifar import Cifar10, Cifar100
from natgrad.data.digits import Digits
from natgrad.data.folder import ImageFolder
from natgrad.data.images import Images, Source, Splits, hold_out
from natgrad.data.regularisation import Regularisation, Regulariser
from natgrad.data.sampler import Sampler

__all__ = [
    "Cifar10",
    "Cifar100",
    "Digits",
    "ImageFolder",
    "Images",
    "Regularisation",
    "Regulariser",
    "Sampler",
    "Source",
    "Splits",
    "hold_out",
]
