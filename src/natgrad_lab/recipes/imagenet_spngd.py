"""SP-NGD's own runs: ResNet-50 on ImageNet at 4,096 to 131,072 images a step (Osawa et al. 2020, Table 2).

Momentum tied to the learning rate (eq. 22) on whole displacements (eq. 23), weights always rescaled (eq. 24), no
weight decay, unit-wise blocks for BatchNorm, running mixup, then erasing with zero. Statistics of every row, stale
where they stand still (tolerance 0.1) up to 32,768; beyond, the paper measures at every step.
--optimizer.rows-per-dim 8 measures a bounded number of rows.
"""

from dataclasses import replace

from natgrad_lab.data import Regularisation
from natgrad_lab.recipes._imagenet import PublishedRow, recipe_of
from natgrad_lab.train.optimizers import SpNgd
from natgrad_lab.train.recipe import Recipe

TABLE = {
    # batch, alpha_mixup, p_decay, e_start, e_end, eta0, m0, damping, epochs, steps
    "4k": PublishedRow(4096, 0.4, 11.0, 1, 53, 8.18e-3, 0.997, 2.5e-4, 35, 10_948),
    "8k": PublishedRow(8192, 0.4, 8.0, 1, 53.5, 1.25e-2, 0.993, 2.5e-4, 35, 5434),
    "16k": PublishedRow(16_384, 0.4, 8.0, 1, 53.5, 2.5e-2, 0.985, 2.5e-4, 35, 2737),
    "32k": PublishedRow(32_768, 0.6, 3.5, 1.5, 49.5, 3.0e-2, 0.97, 2.0e-4, 45, 1760),
    "64k": PublishedRow(65_536, 0.6, 2.9, 2, 64.5, 4.0e-2, 0.95, 1.5e-4, 60, 1173),
    "128k": PublishedRow(131_072, 1.0, 2.9, 3, 100, 7.0e-2, 0.93, 1.0e-4, 90, 873),
}

OPTIMIZER = SpNgd(
    norms="unitwise", length="plain", rows_per_dim=None, coefficient="tied", displaced=True, rescale="always"
)
REGULARISATION = Regularisation(erase=0.5, area=(0.02, 0.25), aspect=(0.3, 1.0))
STALE_UP_TO = 32_768


def imagenet_spngd_4k() -> Recipe:
    """SP-NGD, ResNet-50 on ImageNet, batch 4,096.

    Command: natgrad train imagenet_spngd_4k --data.path data/imagenet
    Cost: 10,948 steps; published: 32.5 minutes on 128 V100 (0.178 s a step).
    Result: published 74.8 % top-1 (75.2 % measuring at every step); not measured by us.
    """
    return _imagenet(TABLE["4k"])


def imagenet_spngd_8k() -> Recipe:
    """SP-NGD, ResNet-50 on ImageNet, batch 8,192.

    Command: natgrad train imagenet_spngd_8k --data.path data/imagenet
    Cost: 5,434 steps; published: 16.9 minutes on 256 V100 (0.186 s a step).
    Result: published 75.3 % top-1 (75.5 % measuring at every step); not measured by us.
    """
    return _imagenet(TABLE["8k"])


def imagenet_spngd_16k() -> Recipe:
    """SP-NGD, ResNet-50 on ImageNet, batch 16,384.

    Command: natgrad train imagenet_spngd_16k --data.path data/imagenet
    Cost: 2,737 steps; published: 6.8 minutes on 512 V100 (0.149 s a step).
    Result: published 75.2 % top-1 (75.3 % measuring at every step); not measured by us.
    """
    return _imagenet(TABLE["16k"])


def imagenet_spngd_32k() -> Recipe:
    """SP-NGD, ResNet-50 on ImageNet, batch 32,768.

    Command: natgrad train imagenet_spngd_32k --data.path data/imagenet
    Cost: 1,760 steps; published: 5.5 minutes on 1,024 V100 (0.187 s a step).
    Result: published 75.4 % top-1 (75.6 % measuring at every step); not measured by us.
    """
    return _imagenet(TABLE["32k"])


def imagenet_spngd_64k() -> Recipe:
    """SP-NGD, ResNet-50 on ImageNet, batch 65,536, measured at every step.

    Command: natgrad train imagenet_spngd_64k --data.path data/imagenet
    Cost: 1,173 steps; published without a time, gradients accumulated.
    Result: published 75.6 % top-1; not measured by us.
    """
    return _imagenet(TABLE["64k"])


def imagenet_spngd_128k() -> Recipe:
    """SP-NGD, ResNet-50 on ImageNet, batch 131,072, measured at every step.

    Command: natgrad train imagenet_spngd_128k --data.path data/imagenet
    Cost: 873 steps; published without a time, gradients accumulated.
    Result: published 74.9 % top-1; not measured by us.
    """
    return _imagenet(TABLE["128k"])


def _imagenet(row: PublishedRow) -> Recipe:
    refresh = None if row.batch <= STALE_UP_TO else 1
    optimizer = replace(OPTIMIZER, lr=row.eta0, momentum=row.m0, damping=row.damping, refresh=refresh)
    return recipe_of(row, optimizer, replace(REGULARISATION, mixup=row.alpha_mixup))
