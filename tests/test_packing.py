"""Triangles, buffers, and what travels between ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from natgrad.parallel import OwnedTensor, run_threads
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
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3), st.integers(1, 6)), min_size=1, max_size=6))
def test_a_buffer_gives_its_tensors_back(items):
    tensors = [symmetric(b, n) if s else torch.randn(b, n) for s, b, n in items]
    flags = [s for s, _, _ in items]
    buffer = pack(tensors, flags)
    assert buffer.shape == (sum(packed_numel(t.shape, s) for t, s in zip(tensors, flags)),)
    for mine, theirs in zip(unpack(buffer, [t.shape for t in tensors], flags), tensors):
        assert torch.equal(mine, theirs)


def test_numbers_on_the_wire():
    assert packed_numel((2, 5, 5), True) == 2 * 15
    assert packed_numel((2, 5, 5), False) == 50
    assert packed_numel((3, 5), True) == 15  # a diagonal has no triangle
    assert packed_numel((5, 5), True) == 25  # nor has one of as many blocks as numbers
    assert packed_numel((), False) == 1


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(2, 4), st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), max_size=6))
def test_worlds_reduce_to_owners_and_gather_from_them(ranks, items):
    """Several dtypes in one call, owners with nothing, and symmetric matrices among others."""

    def work(world):
        torch.manual_seed(world.rank)
        parcels = [
            OwnedTensor(symmetric(1, 3).to(torch.float64 if wide else torch.float32), owner % ranks, s)
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
