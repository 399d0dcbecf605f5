"""Distributed K-FAC (Osawa et al. 2019): ResNet-50 on ImageNet at 4,096 to 131,072 images a step.

Known of that paper: the steps, the shape of the learning rate's decay (at 131,072 read from a figure: to 107.7 of 100
epochs), the empirical Fisher, owners that send directions for every rank to apply, curvature for BatchNorm, and that
statistics replace each other. Here they are measured at every step, as in its runs without a stale Fisher; the fixed
intervals of its fastest run are not known.

Ours: learning rate, momentum, damping and mixup at each batch are those of SP-NGD's Table 2 (imagenet_spngd.py), which
has the same decay; unit-wise blocks for BatchNorm; momentum and rescaling as in the authors' release of 2019. Its
warm-up of the damping (schedules.DampingWarmUp) is left out, because its numbers are not known.
"""

from dataclasses import replace

from natgrad_lab.data import Regularisation
from natgrad_lab.recipes._imagenet import PublishedRow, recipe_of
from natgrad_lab.train.optimizers import KFac
from natgrad_lab.train.recipe import Recipe

TABLE = {
    # batch, alpha_mixup, p_decay, e_start, e_end, eta0, m0, damping, epochs, steps
    "4k": PublishedRow(4096, 0.4, 11.0, 1, 53, 8.18e-3, 0.997, 2.5e-4, 35, 10_948),
    "8k": PublishedRow(8192, 0.4, 8.0, 1, 53.5, 1.25e-2, 0.993, 2.5e-4, 35, 5434),
    "16k": PublishedRow(16_384, 0.4, 8.0, 1, 53.5, 2.5e-2, 0.985, 2.5e-4, 35, 2737),
    "32k": PublishedRow(32_768, 0.6, 3.5, 1.5, 49.5, 3.0e-2, 0.97, 2.0e-4, 45, 1760),
    "64k": PublishedRow(65_536, 0.6, 2.9, 2, 64.5, 4.0e-2, 0.95, 1.5e-4, 60, 1173),
    "128k": PublishedRow(131_072, 1.0, 2.9, 3, 107.7, 7.0e-2, 0.93, 1.0e-4, 100, 978),
}

OPTIMIZER = KFac(
    length="plain",
    gather="directions",
    refresh=1,
    ema_decay=0.0,
    rows_per_dim=None,
    norms="unitwise",
    coefficient="corrected",
    rescale="shrink",
)
REGULARISATION = Regularisation(erase=0.5, per_sample=True, fresh_majority=True, keep_erased=True)


def imagenet_kfac_4k() -> Recipe:
    """Distributed K-FAC of 2019, ResNet-50 on ImageNet, batch 4,096.

    Command: natgrad train imagenet_kfac_4k --data.path data/imagenet
    Cost: 10,948 steps; published: 0.568 s a step on 128 V100.
    Result: published at least 75 % top-1; not measured by us.
    """
    return _imagenet(TABLE["4k"])


def imagenet_kfac_8k() -> Recipe:
    """Distributed K-FAC of 2019, ResNet-50 on ImageNet, batch 8,192.

    Command: natgrad train imagenet_kfac_8k --data.path data/imagenet
    Cost: 5,434 steps; published: 0.569 s a step on 256 V100.
    Result: published at least 75 % top-1; not measured by us.
    """
    return _imagenet(TABLE["8k"])


def imagenet_kfac_16k() -> Recipe:
    """Distributed K-FAC of 2019, ResNet-50 on ImageNet, batch 16,384.

    Command: natgrad train imagenet_kfac_16k --data.path data/imagenet
    Cost: 2,737 steps; published: 0.659 s a step on 512 V100.
    Result: published at least 75 % top-1; not measured by us.
    """
    return _imagenet(TABLE["16k"])


def imagenet_kfac_32k() -> Recipe:
    """Distributed K-FAC of 2019, ResNet-50 on ImageNet, batch 32,768.

    Command: natgrad train imagenet_kfac_32k --data.path data/imagenet
    Cost: 1,760 steps; published: 0.690 s a step on 1,024 V100.
    Result: published at least 75 % top-1; 74.9 % in 10 minutes with a stale Fisher; not measured by us.
    """
    return _imagenet(TABLE["32k"])


def imagenet_kfac_64k() -> Recipe:
    """Distributed K-FAC of 2019, ResNet-50 on ImageNet, batch 65,536.

    Command: natgrad train imagenet_kfac_64k --data.path data/imagenet
    Cost: 1,173 steps; published: 0.744 s a step on 2,048 V100.
    Result: published at least 75 % top-1; not measured by us.
    """
    return _imagenet(TABLE["64k"])


def imagenet_kfac_128k() -> Recipe:
    """Distributed K-FAC of 2019, ResNet-50 on ImageNet, batch 131,072.

    Command: natgrad train imagenet_kfac_128k --data.path data/imagenet
    Cost: 978 steps; published without a time.
    Result: published 75.0 % top-1; not measured by us.
    """
    return _imagenet(TABLE["128k"])


def _imagenet(row: PublishedRow) -> Recipe:
    optimizer = replace(OPTIMIZER, lr=row.eta0, momentum=row.m0, damping=row.damping)
    return recipe_of(row, optimizer, replace(REGULARISATION, mixup=row.alpha_mixup))
