"""CIFAR-100 on ResNet-20 and ResNet-32, every optimizer beside SGD, in large batches.

Images come from a local folder of parquet files (--data.path) and are shifted and mirrored.
"""

from natgrad_lab.data import Cifar100
from natgrad_lab.models import CifarResNet
from natgrad_lab.recipes._contenders import contenders
from natgrad_lab.recipes._family import RecipeRow, family
from natgrad_lab.schedules import Cosine, WarmUp
from natgrad_lab.train.optimizers import Settings
from natgrad_lab.train.recipe import Recipe

TABLE = {
    # name: depth, batch, images that a rank takes at once, epochs, SGD's learning rate
    "resnet20": (20, 1024, 1024, 30, 0.4),
    "resnet32_16k": (32, 16_384, 2048, 200, 3.2),
}


def _recipe(depth: int, batch: int, micro: int, epochs: int, optimizer: Settings) -> Recipe:
    return Recipe(
        Cifar100(),
        CifarResNet(depth=depth),
        optimizer,
        WarmUp(Cosine(), length=0.1),
        batch=batch,
        micro_batch=micro,
        epochs=epochs,
    )


def cifar100_resnet20() -> Recipe:
    """SP-NGD on CIFAR-100, ResNet-20, batch 1,024; --optimizer takes another.

    Command: natgrad train cifar100_resnet20 --data.path data/cifar100
    Cost: 30 epochs of 50,000 images; a GPU is advised.
    Result: nothing published, not measured by us.
    """
    _, optimizer = contenders(1.0)["spngd"]
    return _recipe(*TABLE["resnet20"][:4], optimizer)


def _row(name: str, kind: str) -> RecipeRow:
    depth, batch, micro, epochs, rate = TABLE[name]
    title, optimizer = contenders(rate)[kind]
    return RecipeRow(
        lambda: _recipe(depth, batch, micro, epochs, optimizer),
        f"{title} on CIFAR-100, ResNet-{depth}, batch {batch:,}",
        f"{epochs} epochs of 50,000 images; a GPU is advised",
        "nothing published, not measured by us",
        "data/cifar100",
    )


RECIPES = family(
    __name__,
    {
        "cifar100_resnet20_sgd": _row("resnet20", "sgd"),
        "cifar100_resnet20_spngd": _row("resnet20", "spngd"),
        "cifar100_resnet20_kfac": _row("resnet20", "kfac"),
        "cifar100_resnet20_seng": _row("resnet20", "seng"),
        "cifar100_resnet20_nlcg": _row("resnet20", "nlcg"),
        "cifar100_resnet32_16k_sgd": _row("resnet32_16k", "sgd"),
        "cifar100_resnet32_16k_spngd": _row("resnet32_16k", "spngd"),
        "cifar100_resnet32_16k_kfac": _row("resnet32_16k", "kfac"),
        "cifar100_resnet32_16k_seng": _row("resnet32_16k", "seng"),
        "cifar100_resnet32_16k_nlcg": _row("resnet32_16k", "nlcg"),
    },
)
