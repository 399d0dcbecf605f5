"""CIFAR-10 on ResNet-20, every optimizer beside SGD, in batches of 1,024.

Images come from a local folder of parquet files (--data.path) and are shifted and mirrored.
"""

from natgrad.data import Cifar10
from natgrad.models import CifarResNet
from natgrad.recipes._contenders import contenders
from natgrad.recipes._family import Row, family
from natgrad.schedules import Cosine, WarmUp
from natgrad.train.optimizers import Settings
from natgrad.train.recipe import Recipe


def _recipe(optimizer: Settings) -> Recipe:
    return Recipe(Cifar10(), CifarResNet(depth=20), optimizer, WarmUp(Cosine(), length=0.1), batch=1024, epochs=30)


def _row(kind: str) -> Row:
    title, optimizer = contenders(0.4)[kind]
    return Row(
        f"cifar10_resnet20_{kind}",
        lambda: _recipe(optimizer),
        f"{title} on CIFAR-10, ResNet-20, batch 1,024",
        "30 epochs of 50,000 images; a GPU is advised",
        "nothing published, not measured by us",
        "data/cifar10",
    )


globals().update(family(__name__, (_row(kind) for kind in contenders(1.0))))
