"""SENG on ImageNet as its authors released it: ResNet-50, 256 images a step, 41 epochs.

Theirs: learning rate (five epochs of warm-up from 0.01, then 0.145 (1 - (e - 5) / 60)^6, a tenth of it after epoch 39),
damping 0.17 * 0.9^(e / 10) at epoch e, weight decay, momentum, a measurement every 1,000 steps, how much sampled
curvature is overrated (c = 128), label smoothing, BatchNorms that end a block beginning at gamma 0, and crops of 8.7
to 100 % of an image.

Ours: curvature of all 256 samples together (theirs: the mean of four GPUs' directions, each by its own 64), CountSketch
to the same c^2 numbers, U b exact, curvature for BatchNorm too, weight decay on all weights, single precision, and
images that are brought to 256x256, whatever their shape, before they are cut. Validation is the middle 224x224.
"""

from natgrad_lab.data import ImageSet
from natgrad_lab.models.imagenet import ImageResNet
from natgrad_lab.recipes._seng import released
from natgrad_lab.schedules import Exponential, Piecewise, Polynomial, Product, WarmUp
from natgrad_lab.train.recipe import Recipe

EPOCHS, LR, FIRST = 41, 0.145, 0.01
DATA = ImageSet("data/imagenet", size=256, crop=224, zoom=(0.087, 1.0), in_memory=False)


def imagenet_seng() -> Recipe:
    """SENG, ResNet-50 on ImageNet, batch 256.

    Command: natgrad train imagenet_seng --data.path data/imagenet
    Cost: 41 epochs, 205,164 steps; published for the MindSpore release: 273 minutes on 4 V100.
    Result: published 75.9 % top-1; not measured by us.
    """
    decay = Polynomial(6.0, 5 / EPOCHS, 65 / EPOCHS)
    return Recipe(
        DATA,
        ImageResNet(50, zero_last=True),
        released(c=128, lr=LR, damping=0.17, weight_decay=1e-4, refresh=1000),
        schedule=WarmUp(Product(decay, Piecewise((39 / EPOCHS,), (1.0, 0.1))), 5 / EPOCHS, FIRST / LR),
        damping_schedule=Exponential(0.9, 10 / EPOCHS),
        label_smoothing=0.1,
        batch=256,
        micro_batch=64,
        epochs=EPOCHS,
        drop_last=True,
    )
