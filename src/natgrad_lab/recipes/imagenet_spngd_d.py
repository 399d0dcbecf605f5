"""SP-NGD as its authors released it (2019): ResNet-50-D on ImageNet, 4,096 to 131,072 images a step.

Unlike the paper (imagenet_spngd.py): momentum corrected for the learning rate's change, weights only shrunk, mixup
with a share for each sample of at least one half for the fresh image, blended with erased images, statistics of
every step, one 2c x 2c block for a BatchNorm with 16 times the damping. The epochs are those that the released
configurations run, one more than those of the published results.

Ours: the release's first convolution has a bias, which ImageResNet's has not.
"""

from dataclasses import replace

from natgrad_lab.data import Regularisation
from natgrad_lab.recipes._imagenet import PublishedRow, recipe_of
from natgrad_lab.train.optimizers import SpNgd
from natgrad_lab.train.recipe import Recipe

TABLE = {
    # batch, alpha_mixup, p_decay, e_start, e_end, eta0, m0, damping, epochs, steps
    "4k": PublishedRow(4096, 0.4, 11.0, 1, 53, 8.18e-3, 0.997, 2.5e-4, 36, 11_260),
    "8k": PublishedRow(8192, 0.4, 8.0, 1, 53.5, 1.25e-2, 0.993, 2.5e-4, 36, 5630),
    "16k": PublishedRow(16_384, 0.4, 8.0, 1, 53.5, 2.5e-2, 0.985, 2.5e-4, 36, 2815),
    "32k": PublishedRow(32_768, 0.6, 3.5, 1.5, 49.5, 3.0e-2, 0.97, 2.0e-4, 46, 1799),
    "64k": PublishedRow(65_536, 0.6, 2.9, 2, 64.5, 4.0e-2, 0.95, 1.5e-4, 61, 1192),
    "128k": PublishedRow(131_072, 1.0, 3.0, 1, 95, 7.0e-2, 0.93, 1.0e-4, 81, 792),
}

OPTIMIZER = SpNgd(
    norms="full",
    norm_damping=16,
    length="plain",
    rows_per_dim=None,
    refresh=1,
    coefficient="corrected",
    rescale="shrink",
)
REGULARISATION = Regularisation(erase=0.5, per_sample=True, fresh_majority=True, keep_erased=True)


def imagenet_spngd_d_4k() -> Recipe:
    """SP-NGD as released, ResNet-50-D on ImageNet, batch 4,096.

    Command: natgrad train imagenet_spngd_d_4k --data.path data/imagenet
    Cost: 11,260 steps; the release's configurations are for 128 GPUs, or 8 in 16 parts.
    Result: published 75.9 % top-1 after 35 epochs, 10,948 steps; not measured by us.
    """
    return _imagenet(TABLE["4k"])


def imagenet_spngd_d_8k() -> Recipe:
    """SP-NGD as released, ResNet-50-D on ImageNet, batch 8,192.

    Command: natgrad train imagenet_spngd_d_8k --data.path data/imagenet
    Cost: 5,630 steps; the release's configurations are for 256 GPUs, or 128 in 2 parts.
    Result: published 76.4 % top-1 after 35 epochs, 5,478 steps; not measured by us.
    """
    return _imagenet(TABLE["8k"])


def imagenet_spngd_d_16k() -> Recipe:
    """SP-NGD as released, ResNet-50-D on ImageNet, batch 16,384.

    Command: natgrad train imagenet_spngd_d_16k --data.path data/imagenet
    Cost: 2,815 steps; the release's configurations are for 512 GPUs, or 128 in 4 parts.
    Result: published 76.6 % top-1 after 35 epochs, 2,737 steps; not measured by us.
    """
    return _imagenet(TABLE["16k"])


def imagenet_spngd_d_32k() -> Recipe:
    """SP-NGD as released, ResNet-50-D on ImageNet, batch 32,768.

    Command: natgrad train imagenet_spngd_d_32k --data.path data/imagenet
    Cost: 1,799 steps; the release's configurations are for 1,024 GPUs, or 128 in 8 parts.
    Result: published 76.9 % top-1 after 45 epochs, 1,760 steps; not measured by us.
    """
    return _imagenet(TABLE["32k"])


def imagenet_spngd_d_64k() -> Recipe:
    """SP-NGD as released, ResNet-50-D on ImageNet, batch 65,536.

    Command: natgrad train imagenet_spngd_d_64k --data.path data/imagenet
    Cost: 1,192 steps; the release's configurations are for 2,048 GPUs, or 128 in 16 parts.
    Result: published 76.3 % top-1 after 60 epochs, 1,173 steps; not measured by us.
    """
    return _imagenet(TABLE["64k"])


def imagenet_spngd_d_128k() -> Recipe:
    """SP-NGD as released, ResNet-50-D on ImageNet, batch 131,072.

    Command: natgrad train imagenet_spngd_d_128k --data.path data/imagenet
    Cost: 792 steps; the release's configurations are for 4,096 GPUs, or 128 in 32 parts.
    Result: published 75.0 % top-1 after 80 epochs, 782 steps; not measured by us.
    """
    return _imagenet(TABLE["128k"])


def _imagenet(row: PublishedRow) -> Recipe:
    optimizer = replace(OPTIMIZER, lr=row.eta0, momentum=row.m0, damping=row.damping)
    return recipe_of(row, optimizer, replace(REGULARISATION, mixup=row.alpha_mixup), deep_stem=True)
