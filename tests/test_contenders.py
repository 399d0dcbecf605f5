"""First-order contenders: what their steps are by hand, that every weight trains, and the same step on two ranks."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers import clone, points
from natgrad.parallel import World, run_threads
from natgrad_lab.__main__ import main
from natgrad_lab.models import CifarResNet, Transformer
from natgrad_lab.train.optimizers import Dash, Lamb, Lars, Muon, Shampoo, Soap
from natgrad_lab.train.optimizers.matrices import hidden_matrices

pytest.importorskip("pytorch_optimizer")
ALL = {
    "LARS": Lars(),
    "LAMB": Lamb(),
    "Muon": Muon(),
    "Shampoo": Shampoo(every=1),
    "SOAP": Soap(every=1),
    "DASH": Dash(every=1),
}


class Small(nn.Module):
    """A convolution, a norm and two linear layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, (1, 2), bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(12, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x.view(-1, 1, 1, 4))))
        return self.head(torch.relu(self.hidden(x.flatten(1))))


def give(parameter, gradient):
    parameter.grad = gradient.clone()


def test_lars_goes_trust_times_the_weights_norm_along_the_gradient():
    layer = nn.Linear(4, 3)
    optimizer = Lars(lr=2.0, momentum=0.5, trust=0.01, vectors=0.1, weight_decay=0.1).build(layer, World())
    weight, bias = (p.detach().clone() for p in layer.parameters())
    moved = torch.zeros(3, 4)
    for _ in range(2):
        G, g = torch.randn(3, 4), torch.randn(3)
        give(layer.weight, G)
        give(layer.bias, g)
        before = layer.bias.detach().clone()
        optimizer.step()
        ratio = 0.01 * weight.norm() / (G.norm() + 0.1 * weight.norm())
        moved = 0.5 * moved + ratio * (G + 0.1 * weight)
        weight = weight - 2.0 * moved
        torch.testing.assert_close(layer.weight.detach(), weight)
    assert not torch.equal(before, layer.bias)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.2)
    del bias


def test_lamb_goes_the_weights_norm_along_adams_direction():
    layer = nn.Linear(4, 3, bias=False)
    optimizer = Lamb(lr=0.1, betas=(0.9, 0.99)).build(layer, World())
    weight = layer.weight.detach().clone()
    m = v = torch.zeros(3, 4)
    for _ in range(2):
        G = torch.randn(3, 4)
        give(layer.weight, G)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * G, 0.99 * v + 0.01 * G**2
        direction = m / (v.sqrt() + 1e-6)
        weight = weight - 0.1 * weight.norm() / direction.norm() * direction
        torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-4, atol=1e-5)


def test_muon_steps_have_singular_values_near_one_on_convolutions_as_matrices():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    optimizer = Muon(lr=1.0, lr_scale="original").build(model, World())
    conv = model[0].weight
    assert isinstance(conv, nn.Parameter)
    before = conv.detach().clone()
    for parameter in model.parameters():
        give(parameter, torch.randn_like(parameter))
    optimizer.step()
    values = torch.linalg.svdvals((before - conv.detach()).flatten(1))
    assert values.min() > 0.5
    assert values.max() < 1.3


@pytest.mark.parametrize(
    "make", [lambda: CifarResNet(8).build((3, 8, 8), 10), lambda: Transformer().build((1, 1, 8), 9)]
)
def test_muons_split_takes_every_weight_once(make):
    model = make()
    hidden, rest = hidden_matrices(model)
    assert sorted(map(id, hidden + rest)) == sorted(map(id, model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(p.dim() >= 2 for p in hidden)
    assert not any("head" in names[id(p)] or "letters" in names[id(p)] for p in hidden)
    assert any(p.dim() >= 2 and names[id(p)] == "head.weight" for p in rest)
    assert len(hidden) >= 6
    optimizer = Muon().build(model, World())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))


def test_shampoo_takes_the_inverse_fourth_roots_of_its_statistics():
    layer = nn.Linear(5, 5, bias=False)
    optimizer = Shampoo(lr=0.1, betas=(0.0, 0.5), every=1, graft="sgd").build(layer, World())
    before, G = layer.weight.detach().clone(), torch.randn(5, 5)
    give(layer.weight, G)
    optimizer.step()

    def root(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag(values.clamp_min(1e-12) ** -0.25) @ vectors.T

    direction = root(G @ G.T) @ G @ root(G.T @ G)  # grafted: as long as the gradient
    expected = before - 0.1 * direction * (G.norm() / direction.norm())
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=2e-3, atol=2e-3)
    plain = before - 0.1 * G
    assert (layer.weight.detach() - expected).norm() < 0.1 * (plain - expected).norm()


def test_dash_goes_along_shampoos_direction_at_the_length_of_adams_step():
    layer = nn.Linear(5, 5, bias=False)
    optimizer = Dash(lr=0.1, betas=(0.0, 0.5), every=1).build(layer, World())
    before, G = layer.weight.detach().clone(), torch.randn(5, 5)
    give(layer.weight, G)
    optimizer.step()
    U, _, Vh = torch.linalg.svd(G)  # (G G^T)^-1/4 G (G^T G)^-1/4 = U V^T, which is sqrt(5) long as Adam's step is 5
    torch.testing.assert_close((before - layer.weight.detach()) / 0.1, 5**0.5 * U @ Vh, rtol=1e-2, atol=1e-2)


def test_soap_is_adam_in_the_eigenbasis_and_its_first_step_only_measures():
    layer = nn.Linear(4, 3, bias=False)
    optimizer = Soap(lr=0.1, betas=(0.9, 0.9), every=1).build(layer, World())
    before, first, second = layer.weight.detach().clone(), torch.randn(3, 4), torch.randn(3, 4)
    give(layer.weight, first)
    optimizer.step()
    assert torch.equal(layer.weight, before)
    give(layer.weight, second)
    optimizer.step()
    left, right = (torch.linalg.eigh(m)[1] for m in (first @ first.T, first.T @ first))
    turned = left.T @ ((before - layer.weight.detach()) / 0.1) @ right
    torch.testing.assert_close(turned[:, 1:].abs(), torch.ones(3, 3), rtol=1e-3, atol=1e-3)  # Adam's first step


@pytest.mark.parametrize("name", ALL)
def test_every_weight_moves_and_the_loss_falls(name):
    model = Small()
    optimizer = ALL[name].build(model, World())
    x, y = points(64, 0)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(not torch.equal(before[key], p) for key, p in model.named_parameters())


@pytest.mark.parametrize("name", ALL)
def test_two_ranks_take_the_step_of_one(name):
    start = Small().eval()
    x, y = points(32, 0)

    def train(world):
        model = clone(start)
        optimizer = ALL[name].build(model, world)
        for _ in range(3):
            F.cross_entropy(model(x[world.rank :: world.size]), y[world.rank :: world.size]).backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    alone, (first, second) = train(World()), run_threads(2, train)
    assert torch.equal(first, second)
    if name != "SOAP":  # its basis of what no gradient has shown yet is a matter of rounding
        torch.testing.assert_close(first, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["Muon", "Shampoo", "SOAP", "DASH"])
def test_state_is_held_under_the_real_weights_and_goes_on_after_loading(name):
    model = Small()
    x, y = points(32, 0)

    def steps(model, optimizer, count):
        for _ in range(count):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    optimizer = ALL[name].build(model, World())
    steps(model, optimizer, 3)
    assert all(optimizer.state[p] for p in model.parameters() if p.dim() > 1)
    other = clone(model)
    again = ALL[name].build(other, World())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    torch.testing.assert_close(steps(other, again, 2), steps(model, optimizer, 2))


def test_schedules_reach_the_optimizers_inside():
    model = Small()
    optimizer = Muon(lr=0.5).build(model, World())
    before = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in model.parameters():
        give(p, torch.ones_like(p))
    optimizer.step()
    assert all(torch.equal(old, p) for old, p in zip(before, model.parameters()))


@pytest.mark.parametrize("name", ["Muon", "Shampoo", "SOAP", "DASH"])
def test_weights_in_channels_last_memory_take_the_same_steps(name):
    start = nn.Sequential(nn.Conv2d(2, 8, 2, bias=False), nn.Flatten(), nn.Linear(8, 3))
    gradients = [[torch.randn_like(p) for p in start.parameters()] for _ in range(3)]

    def train(layout):
        model = clone(start).to(memory_format=layout)
        optimizer = ALL[name].build(model, World())
        for step in gradients:
            for parameter, gradient in zip(model.parameters(), step):
                form = layout if gradient.dim() == 4 else torch.contiguous_format
                parameter.grad = gradient.contiguous(memory_format=form)
            optimizer.step()
        return model[0].weight.detach()

    plain, last = train(torch.contiguous_format), train(torch.channels_last)
    assert not last.is_contiguous()
    assert not torch.equal(plain, start[0].weight)
    torch.testing.assert_close(last, plain, rtol=1e-3, atol=1e-4)


def test_weights_that_are_no_matrix_in_memory_are_refused():
    conv = nn.Conv2d(3, 8, 3)
    conv.weight = nn.Parameter(conv.weight.detach().permute(0, 3, 2, 1))
    with pytest.raises(ValueError, match=r"has strides .* make it contiguous"):
        Muon().build(nn.Sequential(conv, nn.Flatten(), nn.Linear(8, 2)), World())


def test_a_library_that_is_missing_is_named_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    assert main(["compare", "digits", "--optimizers", "Nesterov", "SOAP"]) == 2
    said = capsys.readouterr().err
    assert said == "natgrad: pytorch_optimizer is not installed; pip install 'natgrad[bench]'\n"
    assert list(tmp_path.iterdir()) == []
