"""Images in memory, and batches of them on every rank."""

from natgrad_lab.data.cifar import Cifar10, Cifar100
from natgrad_lab.data.images import Images, Source, Splits, hold_out, read_ahead
from natgrad_lab.data.imageset import ImageSet
from natgrad_lab.data.regularisation import Regularisation, Regulariser
from natgrad_lab.data.sampler import Sampler
from natgrad_lab.data.sklearn_digits import Digits

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
