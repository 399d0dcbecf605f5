"""What a step issues depends on the kinds of layers, not on their number, and state stays one with its storage."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import natgrad
from helpers import OPTIMIZERS, backward, made, points, train, weights
from natgrad.layers import Loose
from natgrad.stacks import likeness

NEVER = 10**9


class Counted(TorchDispatchMode):
    """Counts operations that are not views."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        self.operations += not views
        return function(*args, **(kwargs or {}))


def deep(layers):
    torch.manual_seed(0)
    body = [part for _ in range(layers) for part in (nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh())]
    return nn.Sequential(*body, nn.Linear(4, 3))


def operations(kind, layers):
    """Of a step in which nothing is due."""
    model = deep(layers)
    opt = made(kind, model, lr=1e-3, refresh=NEVER)
    train(opt, model, [points(8, k) for k in range(3)])
    backward(model, points(8, 3))
    with Counted() as counted:
        opt.step()
    return counted.operations


@pytest.mark.parametrize("kind", [natgrad.SPNGD, natgrad.KFAC, natgrad.NLCG], ids=lambda kind: kind.__name__)
def test_a_step_of_many_layers_issues_what_one_of_few_does(kind):
    few, many = operations(kind, 4), operations(kind, 24)
    assert few == many
    assert many < 100


def test_a_refresh_of_many_layers_adds_little_to_what_its_hooks_issue():
    """The hooks read each layer; averaging, damping and inverting are done for all at once."""

    def refreshed(layers):
        model = deep(layers)
        opt = natgrad.SPNGD(model, lr=1e-3, refresh=1)
        train(opt, model, [points(8, k) for k in range(12)])  # later measurements have fewer checksums
        backward(model, points(8, 12))
        with Counted() as counted:
            opt.step()
        return counted.operations

    few, many = refreshed(4), refreshed(24)
    assert (many - few) / 40 < 3  # operations for each of 40 more layers: the checksums' sums


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_a_state_that_somebody_replaced_is_taken_over(kind):
    """Trainers put copies of tensors into the state, or move it to a device and back."""

    def trained(between):
        model = deep(3)
        opt = made(kind, model, lr=0.05, refresh=2)
        for step in range(6):
            train(opt, model, [points(8, step)])
            between(opt)
        return weights(model)

    def replaced(opt):
        for parameter, state in list(opt.state.items()):
            opt.state[parameter] = {key: value.clone() for key, value in state.items()}

    def one_by_one(opt):
        for state in opt.state.values():
            for key in state:
                state[key] = state[key].clone()

    def written(opt):
        for state in opt.state.values():
            for key, value in state.items():
                before = value.clone()
                value.zero_()
                state[key].copy_(before)

    plain = trained(lambda opt: None)
    for between in (replaced, one_by_one, written):
        assert torch.equal(trained(between), plain)


def test_what_was_written_into_the_state_counts():
    model = deep(3)
    opt = natgrad.SPNGD(model, lr=0.05, refresh=5, length=natgrad.plain, momentum=0.9)
    train(opt, model, [points(8, 0)])
    assert opt.intervals()["0.A"] == 5
    state = opt.state[model[0].weight]
    state["momentum"].zero_()
    state["A_clock"][0] = 2
    backward(model, points(8, 1))
    opt.step()
    assert opt.state[model[0].weight]["A_clock"].tolist()[0] == 2  # it was not watched: nothing was armed for it
    assert opt.steps_made == 2


def test_layers_that_take_no_part_keep_their_vectors():
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
    opt = natgrad.SPNGD(model, lr=0.05, refresh=1, length=natgrad.plain)
    x = points(8, 0)[0]
    for used in (range(5), (0, 2, 4), (1, 3), range(5)):
        before = {k: opt.state[model[k].weight]["momentum"].clone() for k in range(5)}
        out = x
        for k in used:
            out = torch.tanh(model[k](out))
        out.square().mean().backward()
        opt.step()
        opt.zero_grad()
        for k in range(5):
            moved = not torch.equal(before[k], opt.state[model[k].weight]["momentum"])
            assert moved == (k in used)


def test_layers_that_are_alike_stand_next_to_each_other():
    model = nn.ModuleDict(
        {
            "a": nn.Linear(4, 4),
            "norm": nn.LayerNorm(4),
            "b": nn.Linear(4, 3),
            "c": nn.Linear(4, 4),
            "other": nn.LayerNorm(4),
        }
    )
    model.gain = nn.Parameter(torch.ones(3))
    opt = natgrad.SPNGD(model, lr=0.1)
    (layout,) = opt.storage.layouts
    places = {opt.cells[k].name: at for at, k in enumerate(layout.order)}
    assert abs(places["a"] - places["c"]) == 1
    assert abs(places["norm"] - places["other"]) == 1
    assert isinstance(opt.cells[layout.order[-1]].layer, Loose)
    kinds = {likeness(cell, lambda p: 0, k) for k, cell in enumerate(opt.cells)}
    assert len(kinds) == 4
    for cell in opt.cells:
        for parameter in cell.layer.parameters:
            view = layout.views[parameter].of(torch.arange(layout.numel))
            assert view.shape == parameter.shape
    flat = torch.zeros(layout.numel)
    layout.fill(flat, 0, opt.cells, lambda p: p.detach())
    layers = [opt.cells[k].layer for k in layout.order]
    packed = torch.cat([layer.pack([p.detach() for p in layer.parameters]).flatten() for layer in layers])
    assert_close(flat, packed)


def test_a_layer_whose_unpack_copies_is_refused():
    class Copies(natgrad.layers.linear.Linear):
        def unpack(self, matrix):
            return tuple(part.clone() for part in super().unpack(matrix))

    class Mine(nn.Linear):
        pass

    natgrad.layers.base.layer_of.register(Mine)(lambda module: Copies(module))
    with pytest.raises(TypeError, match="return views"):
        natgrad.SPNGD(nn.Sequential(Mine(3, 2)), lr=0.1)


def test_a_saved_state_is_not_one_with_the_storage():
    model = deep(2)
    opt = natgrad.SPNGD(model, lr=0.05)
    train(opt, model, [points(8, 0)])
    saved = copy.deepcopy(opt.state_dict())
    train(opt, model, [points(8, 1)])
    first = saved["state"][0]
    assert float(first["step"]) == 1
    assert not torch.equal(first["momentum"], opt.state[model[0].weight]["momentum"])
