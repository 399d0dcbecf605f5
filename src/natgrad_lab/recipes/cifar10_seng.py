"""SENG on CIFAR-10 as its authors released it in 2022 and 2021: ResNet-18 and VGG-16 with BatchNorm, 256 images a step.

Theirs: batch, learning rate and its decay, damping, weight decay, momentum, epochs, a measurement every 200 steps, and
how much sampled curvature is overrated (c = 256, threshold 700,000), for which the damping was tuned. The published
accuracies are not known to us.

Ours: sampled columns are sketched by CountSketch to the same c^2 numbers, U b is exact (theirs: a product of means),
the norms of VGG have curvature too (theirs: gradients over 1 + damping), He's initialisation, and CIFAR's usual shifts
and mirrored images. In 2021 the damping followed a rule of its own whose numbers are not known; here it is constant.
"""

from natgrad_lab.data import Cifar10
from natgrad_lab.models import Architecture, CifarResNet, Vgg16
from natgrad_lab.recipes._seng import released
from natgrad_lab.schedules import Cosine, Piecewise, Polynomial, Schedule
from natgrad_lab.train.recipe import Recipe

RESNET18 = CifarResNet(18, (64, 128, 256, 512))


def cifar10_seng_resnet18() -> Recipe:
    """SENG on CIFAR-10, ResNet-18 of 11.2 M weights, batch 256.

    Command: natgrad train cifar10_seng_resnet18 --data.path data/cifar10
    Cost: 65 epochs of 50,000 images, 12,740 steps; a GPU is advised.
    Result: not measured by us.
    """
    return _cifar10(RESNET18, 65, Polynomial(6.0, 0.0, 70 / 65), damping=2.0)


def cifar10_seng_vgg16() -> Recipe:
    """SENG on CIFAR-10, VGG-16 of 134.3 M weights, batch 256.

    Command: natgrad train cifar10_seng_vgg16 --data.path data/cifar10
    Cost: 70 epochs of 50,000 images, 13,720 steps; a GPU is advised.
    Result: not measured by us.
    """
    return _cifar10(Vgg16(), 70, Polynomial(6.0, 0.0, 75 / 70), damping=2.0)


def cifar10_seng_resnet18_2021() -> Recipe:
    """SENG on CIFAR-10 by the settings of 2021, ResNet-18 of 11.2 M weights, batch 256.

    Command: natgrad train cifar10_seng_resnet18_2021 --data.path data/cifar10
    Cost: 65 epochs of 50,000 images, 12,740 steps; a GPU is advised.
    Result: not measured by us.
    """
    return _cifar10(RESNET18, 65, Cosine(0.0, 70 / 65, 0.001 / 0.05), damping=1.0, weight_decay=5e-4)


def cifar10_seng_vgg16_2021() -> Recipe:
    """SENG on CIFAR-10 by the settings of 2021, VGG-16 of 134.3 M weights, batch 256.

    Command: natgrad train cifar10_seng_vgg16_2021 --data.path data/cifar10
    Cost: 100 epochs of 50,000 images, 19,600 steps; a GPU is advised.
    Result: not measured by us.
    """
    return _cifar10(Vgg16(), 100, Piecewise((0.3, 0.6, 0.9), (1.0, 0.1, 0.01, 0.001)), damping=2.0, weight_decay=5e-4)


def _cifar10(
    model: Architecture, epochs: int, schedule: Schedule, damping: float, weight_decay: float = 1e-2
) -> Recipe:
    """In 2022 the learning rate falls to zero behind the end of the run."""
    return Recipe(
        Cifar10(),
        model,
        released(c=256, lr=0.05, damping=damping, weight_decay=weight_decay, refresh=200),
        schedule=schedule,
        batch=256,
        epochs=epochs,
    )
