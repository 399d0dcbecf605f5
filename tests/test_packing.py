"""Triangles, buffers, and what travels between ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import natgrad
from helpers import Mixed, backward, quiet
from multi import share
from natgrad.parallel import Parcel, run_threads
from natgrad.parallel.packing import pack, pack_triangle, packed_numel, unpack, unpack_triangle

relaxed = settings(deadline=None, derandomize=True)


def symmetric(*shape):
    root = torch.randn(*shape, shape[-1])
    return root + root.mT


@relaxed
@given(st.integers(1, 20), st.sampled_from([(), (1,), (3,), (2, 2)]))
def test_a_triangle_holds_a_symmetric_matrix(n, blocks):
    matrix = symmetric(*blocks, n)
    packed = pack_triangle(matrix)
    assert packed.shape == (*blocks, n * (n + 1) // 2)
    assert torch.equal(unpack_triangle(packed, n), matrix)


@relaxed
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3), st.integers(1, 6)), max_size=6), st.integers(0, 5))
def test_a_buffer_gives_its_tensors_back(items, spare):
    tensors = [symmetric(b, n) if s else torch.randn(b, n) for s, b, n in items]
    flags = [s for s, _, _ in items]
    used = sum(packed_numel(t.shape, s) for t, s in zip(tensors, flags))
    buffer = pack(tensors, flags, used + spare)
    assert buffer.shape == (used + spare,)
    assert not buffer[used:].any()
    for mine, theirs in zip(unpack(buffer, [t.shape for t in tensors], flags), tensors):
        assert torch.equal(mine, theirs)


def test_numbers_on_the_wire():
    assert packed_numel((2, 5, 5), True) == 2 * 15
    assert packed_numel((2, 5, 5), False) == 50
    assert packed_numel((3, 5), True) == 15  # a diagonal has no triangle
    assert packed_numel((), False) == 1


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(2, 4), st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), max_size=6))
def test_worlds_reduce_to_owners_and_gather_from_them(ranks, items):
    """Several dtypes in one call, owners with nothing, and symmetric matrices among others."""

    def work(world):
        torch.manual_seed(world.rank)
        parcels = [
            Parcel(symmetric(1, 3).to(torch.float64 if wide else torch.float32), owner % ranks, s)
            for owner, wide, s in items
        ]
        mine = [p.tensor.clone() for p in parcels]
        sums = world.reduce(parcels)
        world.gather(parcels)
        return mine, sums, [p.tensor for p in parcels]

    results = run_threads(ranks, work)
    for k, (owner, _, _) in enumerate(items):
        owner %= ranks
        expected = sum(mine[k] for mine, _, _ in results)
        for rank, (_, sums, gathered) in enumerate(results):
            assert (sums[k] is None) == (rank != owner)
            assert torch.equal(gathered[k], results[owner][0][k])
        assert torch.allclose(results[owner][1][k], expected)


def test_means_sums_and_maxima_reach_everyone():
    def work(world):
        total, top = torch.tensor([1.0 + world.rank]), torch.tensor([world.rank, -world.rank])
        mean = total.clone()
        world.sum([total, whole := torch.tensor(world.rank)])
        world.mean([mean])
        world.max([top])
        return total.item(), mean.item(), top.tolist(), int(whole)

    assert run_threads(3, work) == [(6.0, 2.0, [2, 0], 3)] * 3


def test_the_first_error_of_any_rank_is_raised():
    def work(world):
        if world.rank == 1:
            raise KeyError("rank one")
        world.sum([torch.ones(1)])

    with pytest.raises(KeyError, match="rank one"):
        run_threads(3, work)


def counts(model, ranks=2, steps=1, **options):
    """Bytes by kind of each of `steps` steps on rank 0, and the optimizer's cells."""

    def work(world):
        torch.manual_seed(0)
        mine = model()
        opt = quiet(natgrad.SPNGD, mine, lr=0.01, world=world, **options)
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
    assert first["scalars"] < 1000


def test_nothing_stale_sends_no_statistics():
    (first, second, third), _ = counts(Mixed, steps=3, refresh=2)
    assert first["statistics"] == third["statistics"] > 0
    assert "statistics" not in second
    assert second["gradients"] == first["gradients"]


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
        layer = natgrad.layers.layer_of(module)
        for moment in natgrad.optim.blocks.spngd_blocks(layer, None, 8192).statistics:
            shape = moment.shape(layer)
            full += torch.Size(shape).numel()
            packed += packed_numel(shape, True)
    assert len(convs) + len(norms) + 1 == 107
    assert full * 4 / 1e6 == pytest.approx(615.8, abs=0.1)
    assert packed * 4 / 1e6 == pytest.approx(308.2, abs=0.1)
