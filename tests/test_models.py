"""Networks: published sizes, shapes, initialisation, and what is refused."""

import math

import pytest
import torch
from torch import nn

from natgrad.models import CifarResNet, Mlp


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("depth", "count"), [(20, 269_722), (32, 464_154), (56, 853_018), (110, 1_727_962)])
def test_cifar_resnets_have_their_published_number_of_parameters(depth, count):
    assert parameters(CifarResNet(depth, shortcut="free").build((3, 32, 32), 10)) == count


def test_a_projection_adds_its_convolution_and_norm():
    free = parameters(CifarResNet(20, shortcut="free").build((3, 32, 32), 10))
    conv = parameters(CifarResNet(20, shortcut="conv").build((3, 32, 32), 10))
    assert conv - free == (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)


@pytest.mark.parametrize("shortcut", ["conv", "free"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_resnet_gives_a_logit_for_each_class(shape, shortcut):
    model = CifarResNet(8, (4, 8, 16), shortcut).build(shape, 7)
    assert model(torch.randn(3, *shape)).shape == (3, 7)


def test_free_shortcut_skips_pixels_and_pads_channels():
    model = CifarResNet(8, (2, 4, 8), "free").build((1, 8, 8), 10)
    assert not isinstance(model, nn.Sequential)
    shortcut = model.get_submodule("blocks.1.shortcut")
    x = torch.randn(2, 2, 8, 8)
    y = shortcut(x)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert y[:, [0, 3]].abs().sum() == 0


def test_weights_are_he_normal_and_biases_zero():
    torch.manual_seed(0)
    model = CifarResNet(20).build((3, 32, 32), 100)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5_000:
            expected = math.sqrt(2 / module.weight[0].numel())
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05)
    head = model.get_submodule("head")
    assert isinstance(head, nn.Linear)
    assert head.bias.abs().sum() == 0


def test_mlp_flattens_and_keeps_its_widths():
    model = Mlp((32, 16)).build((1, 8, 8), 10)
    assert [tuple(p.shape) for p in model.parameters() if p.dim() == 2] == [(32, 64), (16, 32), (10, 16)]
    assert model(torch.randn(5, 1, 8, 8)).shape == (5, 10)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: CifarResNet(depth=21), "depth=21 is not 6n"),
        (lambda: CifarResNet(depth=2), "depth=2"),
        (lambda: CifarResNet(widths=(16, 0, 4)), "widths=.* without channels"),
        (lambda: CifarResNet(widths=(16, 8, 4), shortcut="free"), "shrink"),
        (lambda: Mlp((8, 0)), "hidden="),
    ],
)
def test_impossible_networks_are_refused_by_value(make, says):
    with pytest.raises(ValueError, match=says):
        make()
