"""What a step issues depends on the kinds of layers, not on their number, and state stays one with its storage."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import natgrad
from helpers import OPTIMIZERS, backward, made, points, train, weights
from natgrad.layers import UncurvedParameter
from natgrad.optim.segments import Segment
from natgrad.stacks import likeness
from natgrad_lab.plan.simulated import Device

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from host import Counted, Net, waits

NEVER = 10**9


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


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_a_step_of_many_layers_issues_what_one_of_few_does(kind):
    few, many = operations(kind, 4), operations(kind, 24)
    assert few == many
    assert many < 120


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


NETS = {
    "linear": Net(lambda: deep(3), lambda: torch.randn(8, 4)),
    "convolutions": Net(  # read at some of their places
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 14**2, 3)),
        lambda: torch.randn(32, 2, 16, 16),
    ),
}


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.1}], ids=["", "clipped"])
@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_a_step_waits_for_the_device_once(kind, options, net):
    assert waits(net, lambda m: made(kind, m, lr=1e-3, refresh=NEVER, **options)) == 1


@pytest.mark.parametrize("kind", [k for k in OPTIMIZERS if k is not natgrad.NLCG], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "options", [{}, {"max_norm": 0.1}, {"refresh": natgrad.Adaptive(1e-3)}], ids=["", "clipped", "adaptive"]
)
@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_a_step_that_measures_waits_twice(kind, options, net):
    options = {"refresh": 1, **options}
    assert waits(net, lambda m: made(kind, m, lr=1e-3, **options)) == 2


def test_reads_of_the_device_are_seen():
    """What the law above counts."""
    x = torch.zeros(3, device="meta")
    for read in (lambda: x.tolist(), lambda: x[0].item(), lambda: bool(x[0]), lambda: x.cpu(), lambda: float(x.sum())):
        with Device() as device:
            read()
        assert device.reads > 0


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
    train(opt, model, [points(8, 0), points(8, 1)])
    for parameter, state in opt.state.items():
        if "momentum" in state:
            state["momentum"].zero_()
            state[next(key for key in state if key.endswith("_clock"))][0] = 4
        assert parameter in dict.fromkeys(model.parameters())
    backward(model, points(8, 2))
    gradients = [cell.layer.pack([p.grad.clone() for p in cell.layer.parameters]) for cell in opt.cells]
    opt.step()
    for cell, gradient in zip(opt.cells, gradients):
        assert_close(cell.state()["momentum"], cell.precondition(gradient, 3e-4))  # nothing of the steps before
    assert opt.refreshed == 0
    opt.zero_grad()
    train(opt, model, [points(8, 3)])
    assert opt.refreshed > 0  # due in step 4, as the clocks say now


@pytest.mark.parametrize("lose", [lambda opt: opt.state.clear(), lambda opt: opt.state.popitem()], ids=["all", "one"])
def test_a_state_that_was_lost_is_an_error(lose):
    model = deep(2)
    opt = natgrad.SPNGD(model, lr=0.05)
    train(opt, model, [points(8, 0)])
    start = weights(model)
    lose(opt)
    backward(model, points(8, 1))
    with pytest.raises(ValueError, match=r"has lost .* load a whole state"):
        opt.step()
    assert torch.equal(weights(model), start)


def test_a_rule_keeps_what_it_likes():
    """Numbers come as rows of a table; tensors of other shapes are in each cell's state."""

    class Mine:
        def allocate(self, layer, state):
            state["seen"] = torch.zeros(())
            state["rows"] = torch.zeros(layer.shape.blocks * layer.shape.out)
            state["square"] = torch.zeros(layer.shape.blocks, layer.shape.out)

        def __call__(self, segments, natural, world):
            for segment, curved in zip(segments, natural(segments, [s.gradient for s in segments])):
                segment.state["seen"] += 1
                for cell, piece in zip(segment.cells, segment.pieces(segment.gradient)):
                    cell.state()["rows"] += piece.square().sum(2).flatten()
                    cell.state()["square"] += piece.square().sum(2)
                segment.direction = curved

    model = deep(2)
    opt = natgrad.SPNGD(model, lr=0.05, rule=Mine(), length=natgrad.plain)
    train(opt, model, [points(8, 0), points(8, 1)])
    opt.settle()
    for cell in opt.cells:
        assert float(cell.state()["seen"]) == 2
        assert torch.equal(cell.state()["rows"], cell.state()["square"].flatten())
        assert float(cell.state()["rows"].sum()) > 0
    ((outlines,),) = opt.update.aim.outlines.known.values()
    assert [len(outline.cells) for outline in outlines] == [1] * len(opt.cells)  # it keeps a number of each layer


def test_what_has_another_shape_in_every_layer_is_no_vector_of_a_segment():
    class Mine(natgrad.Momentum):
        def allocate(self, layer, state):
            super().allocate(layer, state)
            state["rows"] = torch.zeros(layer.shape.blocks * layer.shape.out)

    model = deep(2)
    opt = natgrad.SPNGD(model, lr=0.05, rule=Mine(), length=natgrad.plain)
    train(opt, model, [points(8, 0)])
    ((outlines,),) = opt.update.aim.outlines.known.values()
    with pytest.raises(KeyError, match="of another shape in every layer"):
        Segment(outlines[0], torch.zeros(outlines[0].numel), opt.update.aim.inputs, []).state["rows"]


def test_a_rule_may_keep_its_gradients():
    """The memory of a step's gradients is free between steps, unless somebody still has it."""

    class Keeping(natgrad.Momentum):
        def __call__(self, segments, natural, world):
            kept.append([segment.gradient for segment in segments])
            copies.append([segment.gradient.clone() for segment in segments])
            super().__call__(segments, natural, world)

    def trained(rule):
        model = deep(2)
        opt = natgrad.SPNGD(model, lr=0.05, rule=rule)
        train(opt, model, [points(8, k) for k in range(4)])
        (vector,) = opt.storage.gradients
        return weights(model), vector.flat().untyped_storage().nbytes(), opt

    kept, copies = [], []
    mine, _, _ = trained(Keeping())
    for own, same in zip(kept, copies):
        for one, other in zip(own, same):
            assert torch.equal(one, other)
    plain, nbytes, opt = trained(natgrad.Momentum())
    assert torch.equal(mine, plain)
    assert nbytes > 0
    opt.storage.release()
    assert opt.storage.gradients[0]._flat.untyped_storage().nbytes() == 0


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
    assert isinstance(opt.cells[layout.order[-1]].layer, UncurvedParameter)
    kinds = {likeness(cell, lambda p: 0, k) for k, cell in enumerate(opt.cells)}
    assert len(kinds) == 4
    for cell in opt.cells:
        for parameter in cell.layer.parameters:
            view = layout.views[parameter].of(torch.arange(layout.numel))
            assert view.shape == parameter.shape
    flat = torch.zeros(layout.numel)
    flat = opt.storage.gradients[0].fill([p.detach() for p in opt.storage.parameters], whole=True)
    layers = [opt.cells[k].layer for k in layout.order]
    packed = torch.cat([layer.pack([p.detach() for p in layer.parameters]).flatten() for layer in layers])
    assert_close(flat, packed)


def test_a_layer_whose_unpack_copies_is_refused():
    class Copies(natgrad.layers.linear.Linear):
        def unpack(self, matrix):
            return tuple(part.clone() for part in super().unpack(matrix))

    class Mine(nn.Linear):
        pass

    natgrad.layers.layer.layer_of.register(Mine)(lambda module: Copies(module))
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


def test_without_torchs_count_of_users_a_step_is_the_same(monkeypatch):
    """The count is not public and may go; then a step's vector is made anew each time."""
    ends = []
    for there in (True, False):
        if not there:
            monkeypatch.delattr(torch._C, "_storage_Use_Count")
        torch.manual_seed(0)
        model = deep(2)
        opt = natgrad.SPNGD(model, 0.1)
        train(opt, model, [points(8, k) for k in range(4)])
        ends.append(weights(model))
    assert torch.equal(*ends)
