"""The sampler: every epoch once over all ranks, whatever the sizes of its batches, and from any batch on."""

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from natgrad_lab.data import Sampler


@st.composite
def samplers(draw):
    """One sampler a rank, of batches that may change from epoch to epoch."""
    size, ranks = draw(st.integers(1, 120)), draw(st.integers(1, 5))
    batches = draw(st.lists(st.integers(min(ranks, size), size), min_size=1, max_size=4))
    ranks = min(ranks, size)
    seed, drop = draw(st.integers(0, 9)), draw(st.booleans())
    return [Sampler(size, tuple(batches), seed, rank, ranks, drop) for rank in range(ranks)]


def plain(batches):
    return [(batch.index.tolist(), batch.total, batch.epoch, batch.position) for batch in batches]


@given(samplers())
def test_over_ranks_an_epoch_is_a_permutation_without_its_last_batch_at_most(ranks):
    first = ranks[0]
    for epoch in range(5):
        shares = [list(sampler.epoch(epoch)) for sampler in ranks]
        assert {len(share) for share in shares} == {first.length(epoch)}
        seen = [place for share in shares for batch in share for place in batch.index.tolist()]
        assert len(set(seen)) == len(seen)
        rest = first.size % first.batch_in(epoch)
        left_out = rest if first.drop_last or rest < len(ranks) else 0
        assert len(seen) == first.size - left_out
        for position, parts in enumerate(zip(*shares)):
            assert {part.total for part in parts} == {sum(len(part.index) for part in parts)}
            assert {(part.epoch, part.position) for part in parts} == {(epoch, position)}


@given(samplers(), st.integers(0, 60))
def test_a_stream_from_a_batch_on_is_the_rest_of_the_whole_stream(ranks, start):
    for sampler in ranks:
        whole = plain(islice(sampler.stream(), start + 12))
        assert plain(islice(sampler.stream(start), 12)) == whole[start:]


@given(samplers(), st.integers(0, 60))
def test_a_count_of_batches_says_epoch_place_and_share_of_an_epoch(ranks, step):
    sampler = ranks[0]
    batch = next(sampler.stream(step))
    assert sampler.locate(step) == (batch.epoch, batch.position)
    expected = batch.epoch + batch.position / sampler.length(batch.epoch)
    assert sampler.epochs_at(step) == pytest.approx(expected, rel=1e-12)


@given(samplers(), st.integers(0, 7))
def test_so_many_epochs_are_so_many_steps(ranks, epochs):
    sampler = ranks[0]
    steps = sampler.total_steps(epochs)
    assert steps == sum(sampler.length(epoch) for epoch in range(epochs))
    assert sampler.locate(steps) == (epochs, 0)


def test_part_of_an_epoch_counts_its_own_batches():
    sampler = Sampler(100, (10, 20, 50))
    assert [sampler.length(epoch) for epoch in range(4)] == [10, 5, 2, 2]
    assert [sampler.total_steps(epochs) for epochs in (0.5, 1, 1.4, 2.5, 4)] == [5, 10, 12, 16, 19]
    assert [round(sampler.epochs_at(step), 2) for step in (0, 5, 11, 16, 18)] == [0, 0.5, 1.2, 2.5, 3.5]


def test_going_on_makes_no_permutation_of_earlier_epochs(monkeypatch):
    made = []
    real = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **more: made.append(1) or real(*args, **more))
    sampler = Sampler(1000, (10, 20))
    batch = next(sampler.stream(100 + 50 * 900 + 7))
    assert (batch.epoch, batch.position, len(made)) == (901, 7, 1)


def test_batches_depend_on_seed_and_epoch_alone():
    first = plain(Sampler(50, 20, seed=1).epoch(0))
    assert first == plain(Sampler(50, 20, seed=1).epoch(0))
    assert first != plain(Sampler(50, 20, seed=1).epoch(1))
    assert first != plain(Sampler(50, 20, seed=2).epoch(0))
    assert [batch.epoch for batch in islice(Sampler(50, 20, seed=1).stream(), 7)] == [0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("batch", "ranks", "said"),
    [
        (0, 1, "batch=0 must be between 1 and the 10"),
        (11, 1, "batch=11"),
        ((5, 11), 1, "batch=11"),
        ((5, 2), 3, "batch=2 leaves some of 3 ranks"),
        ((), 1, r"batch=\(\)"),
    ],
)
def test_batches_that_no_epoch_can_have_are_refused(batch, ranks, said):
    with pytest.raises(ValueError, match=said):
        Sampler(10, batch, ranks=ranks)


def test_a_start_before_the_run_is_refused():
    with pytest.raises(ValueError, match="start=-1"):
        next(Sampler(10, 5).stream(-1))
