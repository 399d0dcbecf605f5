"""NLCG on ImageNet at 65,536 images a step. The paper reports it; its settings are in no source that we could read.

So all of this is OURS, after the release's rules for CIFAR: learning rate 0.1 x batch / 256, a warm-up over an eighth
of the run, drops at 51 % and 76.5 %, running means of the weights, the L2 penalty in the loss without norms.
"""

from natgrad_lab.models.imagenet import ImageResNet
from natgrad_lab.recipes._imagenet import DATA, IMAGES
from natgrad_lab.recipes.cifar100_nlcg import schedule_of
from natgrad_lab.train.optimizers import Nlcg
from natgrad_lab.train.recipe import Recipe

BATCH, EPOCHS = 65_536, 90


def imagenet_nlcg_64k() -> Recipe:
    """NLCG, ResNet-50 on ImageNet, batch 65,536; settings of ours.

    Command: natgrad train imagenet_nlcg_64k --data.path data/imagenet
    Cost: 1,759 steps of 65,536 images; hundreds of GPUs.
    Result: not measured by us; published over 10 points above SGD beyond 65,536, with unknown settings.
    """
    rate = 0.1 * BATCH / 256
    return Recipe(
        DATA,
        ImageResNet(50),
        Nlcg(lr=rate, weight_decay=1e-4, decay_norms=False, mode="faithful"),
        schedule=schedule_of(EPOCHS, EPOCHS / 8, (0.51 * EPOCHS, 0.765 * EPOCHS), 0.001 / rate),
        batch=BATCH,
        micro_batch=32,
        epochs=EPOCHS,
        steps=round(EPOCHS * IMAGES / BATCH),
        drop_last=True,
        average=0.9999,
    )
