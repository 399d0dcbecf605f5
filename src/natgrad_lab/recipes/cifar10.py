"""CIFAR-10 on ResNet-20, every optimizer beside SGD, in batches of 1,024.

Images come from a local folder of parquet files (--data.path) and are shifted and mirrored.
"""

from natgrad_lab.data import Cifar10
from natgrad_lab.models import CifarResNet
from natgrad_lab.recipes._contenders import contenders
from natgrad_lab.recipes._family import RecipeRow, family
from natgrad_lab.schedules import Cosine, WarmUp
from natgrad_lab.train.optimizers import Settings
from natgrad_lab.train.recipe import Recipe


def _recipe(optimizer: Settings) -> Recipe:
    return Recipe(Cifar10(), CifarResNet(depth=20), optimizer, WarmUp(Cosine(), length=0.1), batch=1024, epochs=30)


def _row(kind: str) -> RecipeRow:
    title, optimizer = contenders(0.4)[kind]
    return RecipeRow(
        lambda: _recipe(optimizer),
        f"{title} on CIFAR-10, ResNet-20, batch 1,024",
        "30 epochs of 50,000 images; a GPU is advised",
        "nothing published, not measured by us",
        "data/cifar10",
    )


RECIPES = family(
    __name__,
    {
        "cifar10_resnet20_sgd": _row("sgd"),
        "cifar10_resnet20_spngd": _row("spngd"),
        "cifar10_resnet20_kfac": _row("kfac"),
        "cifar10_resnet20_seng": _row("seng"),
        "cifar10_resnet20_nlcg": _row("nlcg"),
    },
)
