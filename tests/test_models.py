"""Networks: published sizes, shapes, initialisation, and what is refused."""

import math

import pytest
import torch
from torch import nn

from natgrad_lab.models import CifarResNet, Mlp, PreActResNet, Vgg16
from natgrad_lab.models.imagenet import ImageResNet


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("depth", "count"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_cifar_resnets_have_their_published_number_of_parameters(depth, count):
    assert parameters(CifarResNet(depth, shortcut="free").build((3, 32, 32), 10)) == count


@pytest.mark.parametrize(
    ("model", "classes", "count"),
    [
        (ImageResNet(18), 1000, 11_689_512),  # torchvision's
        (ImageResNet(34), 1000, 21_797_672),
        (ImageResNet(50), 1000, 25_557_032),
        (ImageResNet(101), 1000, 44_549_160),
        (ImageResNet(50, deep_stem=True), 1000, 25_576_264),  # timm's resnet50d
        (Vgg16(), 1000, 138_365_992),  # torchvision's vgg16_bn
    ],
    ids=["18", "34", "50", "101", "50-d", "vgg16"],
)
def test_networks_of_imagenet_have_their_published_number_of_parameters(model, classes, count, monkeypatch):
    for module in ("imagenet", "vgg"):
        monkeypatch.setattr(f"natgrad_lab.models.{module}.he_normal", lambda built: built)  # which takes its time
    with torch.device("meta"):
        built = model.build((3, 224, 224), classes)
        assert parameters(built) == count
        assert built(torch.empty(2, 3, 224, 224)).shape == (2, classes)


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.47), (56, 0.86), (110, 1.73)])
def test_the_second_version_of_cifar_resnets_is_the_first_and_its_projections(depth, millions):
    """He et al. 2016 count 1.7 M for ResNet-110 of either version."""
    blocks = (depth - 2) // 6
    first = parameters(CifarResNet(depth, shortcut="free").build((3, 32, 32), 10))
    second = parameters(PreActResNet(depth).build((3, 32, 32), 10))
    projections = 16 * 16 + 16 * 32 + 32 * 64
    norms = 2 * (16 + 32 + 64) * 2 * blocks + 2 * 16  # v1: two a block, one at the start
    own = 2 * ((2 * blocks + 0) * 16 + 16 + (2 * blocks - 1) * 32 + 32 + (2 * blocks - 1) * 64 + 64)
    assert second - first == projections + own - norms
    assert second == pytest.approx(millions * 1e6, rel=0.02)


def test_resnet_18_of_cifar_has_its_published_number_of_parameters():
    assert parameters(CifarResNet(18, (64, 128, 256, 512)).build((3, 32, 32), 10)) == 11_173_962


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (Vgg16(), 134_309_962),  # torchvision's vgg16_bn with ten classes
        (Vgg16((512, 512), pooled=1), 15_253_578),
        (Vgg16((), pooled=1), 14_728_266),
    ],
)
def test_the_kinds_of_vgg_16_have_their_published_number_of_parameters(model, count, monkeypatch):
    monkeypatch.setattr("natgrad_lab.models.vgg.he_normal", lambda built: built)  # which takes its time
    with torch.device("meta"):
        assert parameters(model.build((3, 32, 32), 10)) == count


def test_vgg_gives_a_logit_for_each_class():
    model = Vgg16((8,), pooled=2, width=4).build((1, 32, 32), 7)
    assert model(torch.randn(3, 1, 32, 32)).shape == (3, 7)
    assert [type(layer) for layer in model.children()][-3:] == [nn.ReLU, nn.Dropout, nn.Linear]


@pytest.mark.parametrize("depth", [18, 50])
def test_blocks_may_begin_as_their_shortcuts(depth):
    plain, zero = (ImageResNet(depth, width=2, zero_last=last).build((3, 32, 32), 5) for last in (False, True))
    norms = [m for m in zero.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sum(bool(norm.weight.count_nonzero() == 0) for norm in norms) == {18: 8, 50: 16}[depth]
    assert all(m.weight.count_nonzero() > 0 for m in plain.modules() if isinstance(m, nn.BatchNorm2d))
    block = next(m for m in zero.modules() if hasattr(m, "shortcut"))
    x = torch.randn(2, 2, 8, 8)
    assert torch.equal(block(x), block.get_submodule("shortcut")(x).relu())


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
        (lambda: Vgg16((8, 0)), "hidden="),
        (lambda: Vgg16(pooled=0), "pooled=0"),
        (lambda: Vgg16(width=0), "width=0"),
        (lambda: Vgg16(dropout=1.0), "dropout=1"),
        (lambda: Vgg16().build((3, 28, 28), 10), "28x28"),
    ],
)
def test_impossible_networks_are_refused_by_value(make, says):
    with pytest.raises(ValueError, match=says):
        make()
