"""What travels between ranks in a step, by kind, in bytes."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import natgrad
from helpers import Mixed, backward, clone, quiet, train, weights
from multi import share
from natgrad.layers import layer_of
from natgrad.optim.blocks import spngd_blocks
from natgrad.parallel import Parcel, World, run_threads
from natgrad.parallel.packing import packed_numel


def counts(model, ranks=2, steps=1, kind=natgrad.SPNGD, **options):
    """Bytes by kind of each of `steps` steps on rank 0, and the optimizer's cells."""

    def work(world):
        torch.manual_seed(0)
        mine = model()
        opt = quiet(kind, mine, lr=0.01, world=world, **options)
        result = []
        for k in range(steps):
            backward(mine, share(Mixed.batch(16, k), world))
            opt.step()
            opt.zero_grad()
            result.append(opt.traffic())
        return result, opt.cells

    return run_threads(ranks, work)[0]


def test_traffic_is_triangles_gradients_and_weights():
    [first], cells = counts(Mixed)
    statistics = 0
    for cell in cells:
        for moment in cell.curvature.statistics:
            shape = moment.shape(cell.layer)
            square = len(shape) == 3
            statistics += shape[0] * (shape[1] * (shape[1] + 1) // 2 if square else shape[1])
    parameters = sum(p.numel() for p in Mixed().parameters())
    assert first["statistics"] == 4 * statistics
    assert first["gradients"] == first["weights"] == 4 * parameters


def test_nothing_stale_sends_no_statistics():
    (first, second, third), _ = counts(Mixed, steps=3, refresh=2)
    assert first["statistics"] == third["statistics"] > 0
    assert "statistics" not in second
    assert second["gradients"] == first["gradients"]
    assert second["scalars"] <= 8 * (1 + len(Mixed().state_dict()))  # who has a gradient, and is it finite


def test_directions_travel_instead_of_weights():
    [step], _ = counts(Mixed, kind=natgrad.KFAC, gather="directions")
    assert step["directions"] == step["gradients"]
    assert "weights" not in step


def test_one_rank_sends_nothing():
    [only], _ = counts(Mixed, ranks=1)
    assert not any(only.values())


def test_the_volume_of_a_resnet50_is_the_papers():
    """Spec section 7: 308.2 MB packed in single precision (615.8 MB as full squares), over 53 + 53 + 1 layers."""
    stem = [(3, 64, 7)]
    blocks, c = [], 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for k in range(depth):
            blocks += [(c, width, 1), (width, width, 3), (width, 4 * width, 1)]
            blocks += [(c, 4 * width, 1)] if k == 0 else []
            c = 4 * width
    convs = [nn.Conv2d(i, o, k, bias=False, device="meta") for i, o, k in stem + blocks]
    norms = [nn.BatchNorm2d(m.out_channels, device="meta") for m in convs]
    full = packed = 0
    for module in (*convs, *norms, nn.Linear(2048, 1000, device="meta")):
        layer = layer_of(module)
        for moment in spngd_blocks(layer, None, 8192).statistics:
            shape = moment.shape(layer)
            full += torch.Size(shape).numel()
            packed += packed_numel(shape, True)
    assert len(convs) + len(norms) + 1 == 107
    assert full * 4 / 1e6 == pytest.approx(615.8, abs=0.1)
    assert packed * 4 / 1e6 == pytest.approx(308.2, abs=0.1)


WIRES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_half_precision_halves_the_bytes_of_statistics(wire):
    start = Mixed()

    def work(world):
        model = clone(start)
        opt = natgrad.SPNGD(model, lr=0.02, damping=0.03, samples=None, refresh=1, world=world)
        traffic = []
        for k in range(4):
            backward(model, share(Mixed.batch(16, k), world))
            opt.step()
            opt.zero_grad()
            traffic.append(opt.traffic())
        return weights(model), traffic[-1], opt.engine.dropped

    narrow, wide = run_threads(2, work, wire=wire), run_threads(2, work)
    assert narrow[0][1]["statistics"] * 2 == wide[0][1]["statistics"]
    assert narrow[0][1]["gradients"] == wide[0][1]["gradients"]
    assert narrow[0][2] == 0
    assert torch.equal(narrow[0][0], narrow[1][0])
    assert_close(narrow[0][0], wide[0][0], rtol=0.05, atol=0.01)
    assert not torch.equal(narrow[0][0], wide[0][0])


@pytest.mark.parametrize("wire", WIRES, ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-3, 1e6, 1e20])
def test_a_narrow_sum_survives_every_scale(wire, size):
    """All-zero statistics (a dead layer) and those far outside of float16's range."""

    def work(world):
        tensor = torch.full((1, 3, 3), size * (1 + world.rank))
        return world.reduce_narrow([Parcel(tensor, 1, True)])[0]

    result = run_threads(3, work, wire=wire)
    assert result[0] is None
    assert result[2] is None
    assert_close(result[1], torch.full((1, 3, 3), 6 * size), rtol=0.02, atol=0.0)


def test_a_dead_layer_on_a_narrow_wire():
    """Zero outputs' gradients: G is zero, nothing is dropped and training goes on."""

    def work(world):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 6)), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
        model[2].bias.data.fill_(-100)
        opt = natgrad.SPNGD(model, lr=0.02, samples=None, world=world)
        batch = share(Mixed.batch(16, 0), world)
        train(opt, model, [(batch[0].float(), batch[1])] * 2)
        return weights(model), opt.engine.dropped

    for final, dropped in run_threads(2, work, wire=torch.float16):
        assert bool(torch.isfinite(final).all())
        assert dropped == 0


def test_an_unknown_wire_is_refused():
    with pytest.raises(ValueError, match=r"wire=torch.int8.*torch.bfloat16"):
        World(wire=torch.int8)
