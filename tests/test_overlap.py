"""Gradients that leave during the backward pass: the same steps, and one line for whoever changes them too late."""

import copy
import pickle

import pytest
import torch
from torch import nn

import natgrad
from helpers import Mixed, Net, backward, clone, weights
from multi import check, run, share
from natgrad.optim.overlap import SHARES, fill
from natgrad.parallel import World, run_threads


def spngd(model, world, **options):
    return natgrad.SPNGD(model, **{"lr": 0.02, "damping": 0.03, "rows_per_dim": None, "world": world, **options})


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind", [Mixed, Net])
def test_early_gradients_make_the_same_steps(kind, ranks, double):
    check(ranks, kind(), [kind.batch(24, k) for k in range(5)], spngd, overlap=True)


def test_buckets_leave_during_the_backward_pass(double):
    """Seen from the hook of the first layer's weight, the gradients of later layers are under way."""
    start = Net()

    def work(world):
        model = clone(start)
        opt = spngd(model, world)
        early = opt.gradients.overlap
        seen = []
        first = next(model.parameters())
        first.register_hook(lambda _: seen.append(len(early.under_way)))
        backward(model, share(Net.batch(12, 0), world))
        return seen, len(early.buckets), len(early.under_way)

    for seen, buckets, sent in run_threads(2, work, overlap=True):
        assert 0 < seen[0] < buckets
        assert sent == buckets > 1


def test_buckets_keep_their_order_and_their_size():
    parameters = [nn.Parameter(torch.zeros(n)) for n in (5, 1, 1, 1, 40, 3, 3, 30, 30)]
    buckets = fill(parameters)
    assert [p for bucket in buckets for p in bucket] == parameters
    total = sum(p.numel() for p in parameters)
    assert all(sum(p.numel() for p in bucket[:-1]) < total / SHARES for bucket in buckets)
    assert all(sum(p.numel() for p in bucket) >= total / SHARES for bucket in buckets[:-1])
    assert len(fill([nn.Parameter(torch.zeros(2**24))] * 9)) == 9


def test_micro_batches_add_up_unsent(double):
    start = Mixed()
    batch = Mixed.batch(24, 0)

    def work(world, micro):
        model = clone(start)
        opt = spngd(model, world)
        mine = share(batch, world)
        parts = [tuple(t.chunk(2)[k] for t in mine) for k in range(2)] if micro else [mine]
        for part in parts[:-1]:
            with opt.no_sync():
                (torch.nn.functional.cross_entropy(model(part[0]), part[1]) / len(parts)).backward()
        (torch.nn.functional.cross_entropy(model(parts[-1][0]), parts[-1][1]) / len(parts)).backward()
        opt.step()
        return weights(model)

    for options in ({"overlap": True}, {}):
        whole = run_threads(2, lambda world: work(world, False), **options)[0]
        micro = run_threads(2, lambda world: work(world, True), **options)[0]
        torch.testing.assert_close(micro, whole, rtol=1e-9, atol=1e-12)


def test_a_second_backward_pass_is_refused(double):
    def work(world):
        model = Net()
        opt = spngd(model, world)
        backward(model, Net.batch(12, 0))
        assert opt.gradients.overlap.under_way
        with pytest.raises(ValueError, match=r"opt\.no_sync\(\)"):
            backward(model, Net.batch(12, 0))

    run_threads(2, work, overlap=True)


def test_gradients_changed_too_late_are_refused(double):
    def work(world):
        model = Net()
        opt = spngd(model, world)
        backward(model, Net.batch(12, 0))
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        with pytest.raises(ValueError, match=r"max_norm=.*opt\.average_gradients\(\)"):
            opt.step()

    run_threads(2, work, overlap=True)


def test_reduce_then_clip(double):
    start, batch = Net(), Net.batch(24, 0)
    outcome = []
    for ranks, options in ((1, {}), (2, {}), (2, {"overlap": True})):

        def work(world):
            model = clone(start)
            opt = spngd(model, world)
            backward(model, share(batch, world))
            opt.average_gradients()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            opt.step()
            return weights(model), opt.traffic()

        results = run_threads(ranks, work, **options)
        assert all(torch.equal(final, results[0][0]) for final, _ in results)
        outcome.append(results[0][0])
    for other in outcome[1:]:
        torch.testing.assert_close(other, outcome[0], rtol=1e-9, atol=1e-12)


def test_a_step_that_is_given_up_leaves_nothing(double):
    """Not finite on one rank, and zero_grad() without a step: the next step is as if they had not been."""
    start = Net()

    def work(world, trouble):
        model = clone(start)
        opt = spngd(model, world, refresh=1)
        if trouble:
            x, y = share(Net.batch(24, 7), world)
            backward(model, (x * (float("nan") if world.rank else 1), y))
            opt.step()
            opt.zero_grad()
            assert opt.skipped == 1
            backward(model, share(Net.batch(24, 8), world))
            opt.zero_grad()
        backward(model, share(Net.batch(24, 0), world))
        opt.step()
        return weights(model)

    calm, rough = (run_threads(2, lambda world, t=t: work(world, t), overlap=True) for t in (False, True))
    assert torch.equal(calm[0], rough[0])
    assert torch.equal(rough[0], rough[1])


class Halves(nn.Module):
    """One of two layers is used, the other one is not."""

    def __init__(self):
        super().__init__()
        self.body, self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.left(h) if bool((x[:, 0] > 0).all()) else self.right(h)


def test_ranks_may_use_unlike_parts(double):
    start = Halves()
    x = torch.randn(16, 4)
    x[:, 0] = torch.cat([torch.ones(8), -torch.ones(8)])
    batches = [(x, torch.randint(3, (16,))) for _ in range(3)]
    ends = []
    for options in ({}, {"overlap": True}):
        results = run(2, start, batches, spngd, **options)
        assert torch.equal(results[0][0], results[1][0])
        ends.append(results[0][0])
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)

    def reduced(world):
        model = clone(start)
        opt = spngd(model, world)
        backward(model, share(batches[0], world))
        opt.average_gradients()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    both = run_threads(2, reduced)
    assert torch.equal(*both)
    assert torch.equal(both[0], run_threads(2, reduced, overlap=True)[0])


def test_copies_and_new_optimizers_do_not_send_twice(double):
    def work(world):
        model = Net()
        old = spngd(model, world)
        opt = spngd(model, world)
        backward(model, Net.batch(12, 0))
        assert not old.gradients.overlap.under_way
        assert opt.gradients.overlap.under_way
        opt.step()
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            backward(copied, Net.batch(12, 0))
        return len(opt.gradients.overlap.under_way)

    assert run_threads(2, work, overlap=True) == [0, 0]


def test_a_wrapper_overlaps_by_itself():
    with pytest.raises(ValueError, match="leave overlap off"):
        World(overlap=True, gradients="averaged")
    assert World(overlap=True).gradients == "local"
