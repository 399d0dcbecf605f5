"""Images in memory, and batches of them on every rank."""

from natgrad.data.cifar import Cifar10, Cifar100
from natgrad.data.digits import Digits
from natgrad.data.images import Images, Source, Splits, hold_out, read_ahead
from natgrad.data.imageset import ImageSet
from natgrad.data.regularisation import Regularisation, Regulariser
from natgrad.data.sampler import Sampler

__all__ = [
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
    "hold_out",
    "read_ahead",
]
