"""A folder of images at 64x64 pixels on a ResNet-18 of half the width, every optimizer beside SGD: ImageNet in small.

PATH/train/CLASS/ and PATH/val/CLASS/ hold the images, of any shape; they are brought to 72x72, of which 64x64 are cut
out at random and mirrored.
"""

from natgrad_lab.data import ImageSet
from natgrad_lab.models import ImageResNet
from natgrad_lab.recipes._contenders import contenders
from natgrad_lab.recipes._family import RecipeRow, family
from natgrad_lab.schedules import Cosine, WarmUp
from natgrad_lab.train.optimizers import Settings
from natgrad_lab.train.recipe import Recipe


def _recipe(optimizer: Settings) -> Recipe:
    return Recipe(
        ImageSet("data/images", size=72, crop=64),
        ImageResNet(18, width=32),
        optimizer,
        WarmUp(Cosine(), length=0.1),
        batch=256,
        epochs=20,
    )


def _row(kind: str) -> RecipeRow:
    title, optimizer = contenders(0.1)[kind]
    return RecipeRow(
        lambda: _recipe(optimizer),
        f"{title} on a folder of images at 64x64, ResNet-18 of width 32, batch 256",
        "20 epochs; of 5,000 images 391 steps",
        "depends on the images, not measured by us",
        "data/images",
    )


RECIPES = family(
    __name__,
    {
        "imagefolder64_sgd": _row("sgd"),
        "imagefolder64_spngd": _row("spngd"),
        "imagefolder64_kfac": _row("kfac"),
        "imagefolder64_seng": _row("seng"),
        "imagefolder64_nlcg": _row("nlcg"),
    },
)
