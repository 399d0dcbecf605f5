"""SGD with momentum on ImageNet at 8,192 images a step, the baseline of all large batches (Goyal et al. 2017).

Learning rate 0.1 x batch / 256 with a warm-up of five epochs from 0.1, a tenth of it after epochs 30, 60 and 80; weight
decay; blocks that begin as their shortcuts. Ours: weight decay includes norms, and images are brought to 256x256,
whatever their shape, before they are cut.
"""

from natgrad_lab.data import ImageSet
from natgrad_lab.models import ImageResNet
from natgrad_lab.schedules import Piecewise, WarmUp
from natgrad_lab.train.optimizers import Sgd
from natgrad_lab.train.recipe import Recipe

BATCH, EPOCHS, STEPS, RATE = 8192, 90, 14_076, 3.2
DATA = ImageSet("data/imagenet", size=256, crop=224, zoom=(0.08, 1.0), in_memory=False)


def imagenet_sgd_8k() -> Recipe:
    """SGD with momentum, ResNet-50 on ImageNet, batch 8,192.

    Command: natgrad train imagenet_sgd_8k --data.path data/imagenet
    Cost: 14,076 steps; published: an hour on 256 P100 (0.255 s a step).
    Result: published 76.3 % top-1; not measured by us.
    """
    drops = Piecewise((30 / EPOCHS, 60 / EPOCHS, 80 / EPOCHS), (1.0, 0.1, 0.01, 0.001))
    return Recipe(
        DATA,
        ImageResNet(50, zero_last=True),
        Sgd(lr=RATE, momentum=0.9, nesterov=True, weight_decay=1e-4),
        schedule=WarmUp(drops, 5 / EPOCHS, 0.1 / RATE),
        batch=BATCH,
        micro_batch=32,
        epochs=EPOCHS,
        steps=STEPS,
        drop_last=True,
    )
