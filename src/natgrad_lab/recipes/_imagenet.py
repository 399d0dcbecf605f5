"""What the recipes of ImageNet share: a row of a paper's table becomes a Recipe.

Epochs are those of 1,281,167 images; schedules count in them, and a row's steps say how many a run takes. Whatever
part of a run is asked for (--steps 3), its schedules end where the whole run's do.

Ours, everywhere: a batch is never cut short at the end of an epoch (drop_last), BatchNorm's statistics are estimated
anew before an evaluation, and networks start with torch's BatchNorm (gamma 1, epsilon 1e-5).
"""

from typing import NamedTuple

from natgrad_lab.data import ImageSet, Regularisation
from natgrad_lab.models.imagenet import ImageResNet
from natgrad_lab.schedules import Polynomial
from natgrad_lab.train.optimizers import Settings
from natgrad_lab.train.recipe import Recipe

IMAGES = 1_281_167
"""Training images of ImageNet (ILSVRC 2012)."""

DATA = ImageSet("data/imagenet", size=256, crop=224, subtract="image", in_memory=False)
"""Resized to 256x256 whatever the shape, 224x224 at random, mirrored, less the mean image, over 255 (SP-NGD 6.1)."""


class PublishedRow(NamedTuple):
    """One row of a table of hyper-parameters, under the papers' names."""

    batch: int
    alpha_mixup: float
    p_decay: float
    e_start: float
    e_end: float
    eta0: float
    m0: float
    damping: float
    epochs: float
    steps: int


def recipe_of(
    row: PublishedRow, optimizer: Settings, regularisation: Regularisation, deep_stem: bool = False
) -> Recipe:
    """ResNet-50 (or -D) on ImageNet with a row's batch, schedule and length, 32 images at a time on each rank."""
    whole = row.steps * row.batch / IMAGES  # epochs of the run
    return Recipe(
        DATA,
        ImageResNet(50, deep_stem=deep_stem),
        optimizer,
        schedule=Polynomial(row.p_decay, row.e_start / whole, row.e_end / whole),
        regularisation=regularisation,
        batch=row.batch,
        micro_batch=32,
        epochs=row.epochs,
        steps=row.steps,
        drop_last=True,
    )
