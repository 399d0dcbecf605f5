"""CIFAR-100 on ResNet-32, from a local folder of parquet files (--data.path), in large batches."""

from natgrad.data import Cifar100
from natgrad.models import CifarResNet
from natgrad.schedules import Cosine, WarmUp
from natgrad.train.optimizers import Settings, Sgd, SpNgd
from natgrad.train.recipe import Recipe


def cifar100_sgd() -> Recipe:
    """SGD with momentum on CIFAR-100, ResNet-32, batch 1,024, with a warm-up.

    Command: natgrad train cifar100_sgd --data.path data/cifar100
    Cost: 30 epochs of 50,000 images; a GPU is advised.
    Result: not measured yet.
    """
    return _cifar100(Sgd(lr=0.4, momentum=0.9, nesterov=True, weight_decay=5e-4))


def cifar100_spngd() -> Recipe:
    """SP-NGD on CIFAR-100, ResNet-32, batch 1,024.

    Command: natgrad train cifar100_spngd --data.path data/cifar100
    Cost: 30 epochs of 50,000 images; a GPU is advised.
    Result: not measured yet.
    """
    return _cifar100(SpNgd(lr=0.05, damping=1e-3, weight_decay=5e-4))


def _cifar100(optimizer: Settings) -> Recipe:
    schedule = WarmUp(Cosine(), length=0.1)
    return Recipe(Cifar100(), CifarResNet(depth=32), optimizer, schedule, batch=1024, epochs=30)
