"""SENG's recipes against its hyper-parameters, written out a second time, and made small for real."""

import math
from dataclasses import replace

import pytest
import torch

from natgrad.parallel import World
from natgrad_lab.data import Cifar10, ImageSet
from natgrad_lab.models import CifarResNet, Vgg16
from natgrad_lab.models.imagenet import ImageResNet
from natgrad_lab.recipes import find
from natgrad_lab.schedules import Constant
from natgrad_lab.train.loop import prepare, steps
from natgrad_lab.train.optimizers import Seng
from pictures import write_images
from test_cifar import write_cifar

# batch, lr, lambda, weight decay, momentum, refresh, c, threshold, epochs
TABLE = {
    "cifar10_seng_resnet18": (256, 0.05, 2.0, 1e-2, 0.9, 200, 256, 7e5, 65),
    "cifar10_seng_vgg16": (256, 0.05, 2.0, 1e-2, 0.9, 200, 256, 7e5, 70),
    "cifar10_seng_resnet18_2021": (256, 0.05, 1.0, 5e-4, 0.9, 200, 256, 7e5, 65),
    "cifar10_seng_vgg16_2021": (256, 0.05, 2.0, 5e-4, 0.9, 200, 256, 7e5, 100),
    "imagenet_seng": (256, 0.145, 0.17, 1e-4, 0.9, 1000, 128, 7e5, 41),
}


def cifar_rate(end):
    return lambda e: 0.05 * (1 - e / end) ** 6


def imagenet_rate(e):
    if e < 5:
        return 0.01 + (0.145 - 0.01) * e / 5
    return 0.145 * (1 - (e - 5) / 60) ** 6 / (10 if e > 39 else 1)


RATES = {
    "cifar10_seng_resnet18": cifar_rate(70),
    "cifar10_seng_vgg16": cifar_rate(75),
    "cifar10_seng_resnet18_2021": lambda e: 0.001 + 0.5 * (0.05 - 0.001) * (1 + math.cos(math.pi * e / 70)),
    "cifar10_seng_vgg16_2021": lambda e: 0.05 * 0.1 ** (e // 30),
    "imagenet_seng": imagenet_rate,
}


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_is_its_row(name):
    recipe = find(name)()
    batch, lr, damping, decay, momentum, refresh, c, threshold, epochs = TABLE[name]
    optimizer = recipe.optimizer
    assert isinstance(optimizer, Seng)
    assert (recipe.batch, recipe.epochs, recipe.steps) == (batch, epochs, None)
    assert (optimizer.lr, optimizer.damping, optimizer.weight_decay) == (lr, damping, decay)
    assert (optimizer.momentum, optimizer.refresh, optimizer.samples) == (momentum, refresh, batch)
    assert (optimizer.legacy, optimizer.legacy_c, optimizer.legacy_threshold) == (True, c, threshold)
    assert optimizer.sketch_size == c**2
    assert (optimizer.columns, optimizer.block, optimizer.rank) == ("empirical", "layer", None)
    assert not optimizer.legacy_mean_field


@pytest.mark.parametrize("name", TABLE)
def test_rates_and_damping_fall_as_theirs(name):
    recipe = find(name)()
    for e in [0, 0.5, 3, 5, 7.3, 20, 38.9, 39.1, recipe.epochs]:
        t = e / recipe.epochs
        assert recipe.optimizer.lr * recipe.schedule(t) == pytest.approx(RATES[name](e), rel=1e-9)
        if name == "imagenet_seng":
            assert 0.17 * recipe.damping_schedule(t) == pytest.approx(0.17 * 0.9 ** (e / 10), rel=1e-12)
    assert name == "imagenet_seng" or recipe.damping_schedule == Constant()


def test_networks_and_images_are_theirs():
    assert find("cifar10_seng_resnet18")().model == CifarResNet(18, (64, 128, 256, 512), "conv")
    assert find("cifar10_seng_vgg16")().model == Vgg16((4096, 4096), pooled=7, dropout=0.5)
    recipe = find("imagenet_seng")()
    assert recipe.model == ImageResNet(50, zero_last=True)
    assert (recipe.label_smoothing, recipe.drop_last, recipe.micro_batch) == (0.1, True, 64)
    data = recipe.data
    assert isinstance(data, ImageSet)
    assert (data.size, data.crop, data.zoom, data.in_memory) == (256, 224, (0.087, 1.0), False)
    assert data.shape() == (3, 224, 224)


def small(name, path):
    """The recipe with little data and a narrow network."""
    recipe = find(name)()
    if isinstance(recipe.data, Cifar10):
        write_cifar(path)
        model = CifarResNet(18, (2, 2, 4, 4)) if "resnet" in name else Vgg16((8,), pooled=1, width=2)
        return replace(recipe, data=Cifar10(str(path)), model=model, batch=8, steps=3)
    write_images(path, classes=("cat", "cow", "dog"), count=6)
    data = replace(recipe.data, path=str(path), size=36, crop=32)
    model = replace(recipe.model, depth=18, width=4)
    return replace(recipe, data=data, model=model, batch=12, micro_batch=5, steps=3)


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_runs_when_made_small(name, tmp_path):
    recipe = small(name, tmp_path)
    job = prepare(recipe, World(), recipe.data.load())
    records = list(steps(job))
    assert [r.step for r in records] == [1, 2, 3]
    assert [r.lr for r in records] == pytest.approx([recipe.optimizer.lr * recipe.schedule(k / 3) for k in range(3)])
    assert all(torch.tensor(r.loss).isfinite() for r in records)
    assert job.optimizer.state[next(iter(job.model.parameters()))]
    assert job.score().loss > 0
