"""SENG on CIFAR-10 as its authors released it in 2022: ResNet-18 and VGG-16 with BatchNorm, 256 images a step.

Theirs: batch, learning rate and its decay, damping, weight decay, momentum, epochs, a measurement every 200 steps, and
how much sampled curvature is overrated (c = 256, threshold 700,000), for which the damping was tuned. The published
accuracies are not known to us.

Ours: sampled columns are sketched by CountSketch to the same c^2 numbers, U b is exact (theirs: a product of means),
the norms of VGG have curvature too (theirs: gradients over 1 + damping), He's initialisation, and CIFAR's usual shifts
and mirrored images.
"""

from natgrad.data import Cifar10
from natgrad.models import Architecture, CifarResNet, Vgg16
from natgrad.recipes._seng import released
from natgrad.schedules import Polynomial
from natgrad.train.recipe import Recipe


def cifar10_seng_resnet18() -> Recipe:
    """SENG on CIFAR-10, ResNet-18 of 11.2 M weights, batch 256.

    Command: natgrad train cifar10_seng_resnet18 --data.path data/cifar10
    Cost: 65 epochs of 50,000 images, 12,740 steps; a GPU is advised.
    Result: not measured by us.
    """
    return _cifar10(CifarResNet(18, (64, 128, 256, 512)), epochs=65, until=70)


def cifar10_seng_vgg16() -> Recipe:
    """SENG on CIFAR-10, VGG-16 of 134.3 M weights, batch 256.

    Command: natgrad train cifar10_seng_vgg16 --data.path data/cifar10
    Cost: 70 epochs of 50,000 images, 13,720 steps; a GPU is advised.
    Result: not measured by us.
    """
    return _cifar10(Vgg16(), epochs=70, until=75)


def _cifar10(model: Architecture, epochs: int, until: int) -> Recipe:
    """The learning rate falls to zero at epoch `until`, behind the end of the run."""
    return Recipe(
        Cifar10(),
        model,
        released(c=256, lr=0.05, damping=2.0, weight_decay=1e-2, refresh=200),
        schedule=Polynomial(6.0, 0.0, until / epochs),
        batch=256,
        epochs=epochs,
    )
