"""When statistics are measured again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import natgrad
from helpers import Net, backward, mlp, points, statistic
from natgrad.refresh import History, Staleness

MANY = 10**6


def replay(rule, changes, samples=MANY):
    """Intervals of a statistic whose changes against (last, before) are given."""
    interval = previous = 1
    result = []
    for pair in changes:
        interval, previous = rule.next(History(pair, interval, previous, samples)), interval
        result.append(interval)
    return result


def test_a_constant_statistic_is_measured_after_fibonacci_intervals():
    changes = [(None, None), (0.0, None)] + [(0.0, 0.0)] * 7
    assert replay(natgrad.Adaptive(), changes) == [1, 1, 2, 3, 5, 8, 13, 21, 34]


def test_eighteen_refreshes_in_the_papers_longest_run():
    """Spec section 7: from D = D_-1 = 1 on 2, 3, 5, ...: 18 refreshes in 10,948 steps, 15 in 2,737, 14 in 1,760."""
    for steps, expected in ((10_948, 18), (2_737, 15), (1_760, 14)):
        interval = previous = refreshes = now = 1
        refreshes = 0
        while now <= steps:
            refreshes += 1
            interval, previous = natgrad.Adaptive().next(History((0.0, 0.0), interval, previous, MANY)), interval
            now += interval
        assert refreshes == expected


def test_a_change_halves_and_half_a_likeness_keeps():
    adaptive = natgrad.Adaptive()
    assert adaptive.next(History((0.2, 0.0), 21, 13, MANY)) == 10
    assert adaptive.next(History((0.05, 0.2), 21, 13, MANY)) == 21
    assert adaptive.next(History((0.05, 0.05), 21, 13, MANY)) == 34
    assert adaptive.next(History((0.2, 0.2), 1, 1, MANY)) == 1
    assert adaptive.next(History((0.1, 0.0), 8, 5, MANY)) == 4  # not below the tolerance
    assert adaptive.next(History((float("inf"), None), 8, 5, MANY)) == 4
    assert natgrad.Adaptive(limit=30).next(History((0.0, 0.0), 21, 13, MANY)) == 30


def test_the_tolerance_widens_as_samples_fall():
    adaptive = natgrad.Adaptive(tolerance=0.1, at=4096)
    for samples, tolerance in ((16_384, 0.1), (4096, 0.1), (1024, 0.2), (256, 0.4), (16, 1.6)):
        below, above = tolerance * 0.99, tolerance * 1.01
        assert adaptive.next(History((below, below), 8, 5, samples)) == 13
        assert adaptive.next(History((above, below), 8, 5, samples)) == 4


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=30),
    st.one_of(st.none(), st.integers(1, 20)),
    st.integers(1, 10**5),
)
def test_intervals_are_whole_positive_and_capped(changes, limit, samples):
    for interval in replay(natgrad.Adaptive(limit=limit), changes, samples):
        assert isinstance(interval, int)
        assert 1 <= interval <= (limit or 10**9)


def test_every_is_every():
    assert replay(natgrad.Every(7), [(None, None), (0.9, 0.9), (0.0, 0.0)]) == [7, 7, 7]


def refreshes(opt, model, batch, steps):
    """The steps at which anything was measured."""
    result = []
    for k in range(1, steps + 1):
        backward(model, batch(k))
        opt.step()
        opt.zero_grad()
        if opt.refreshed:
            result.append(k)
            assert opt.refreshed == 1.0
    return result


def test_an_optimizer_on_constant_data_with_a_tiny_lr():
    model, batch = Net().double(), Net.batch(16, 0)
    opt = natgrad.SPNGD(model, lr=1e-12, rows_per_dim=None)
    assert refreshes(opt, model, lambda k: batch, 60) == [1, 2, 3, 5, 8, 13, 21, 34, 55]
    assert set(opt.intervals().values()) == {34}


def test_an_optimizer_on_changing_data_measures_every_step():
    model = mlp()
    opt = natgrad.SPNGD(model, lr=1e-12, rows_per_dim=None, refresh=natgrad.Adaptive(tolerance=1e-9))
    assert refreshes(opt, model, lambda k: points(16, k), 6) == [1, 2, 3, 4, 5, 6]


def test_a_whole_number_and_a_groups_own_refresh():
    model = mlp()
    groups = [{"params": model[0].parameters(), "refresh": 2}, {"params": model[2].parameters()}]
    opt = natgrad.SPNGD(model, lr=0.01, refresh=3, params=groups)
    shares = []
    for k in range(7):
        backward(model, points(8, k))
        opt.step()
        opt.zero_grad()
        shares.append(opt.refreshed)
    assert shares == [1.0, 0.0, 0.5, 0.5, 0.5, 0.0, 1.0]
    assert opt.intervals() == {"0.A": 2, "0.G": 2, "2.A": 3, "2.G": 3}


def test_staleness_of_your_own():
    class Doubling(Staleness):
        def next(self, memory):
            return memory.interval * 2

    model = mlp()
    opt = natgrad.SPNGD(model, lr=0.01, refresh=Doubling())
    assert refreshes(opt, model, lambda k: points(8, k), 16) == [1, 3, 7, 15]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_averaging_over_time(decay):
    """The first measurement counts in full; later ones by 1 - min(decay, k / (k + 1))."""
    model, values, expected = mlp().double(), [], None
    opt = natgrad.SPNGD(model, lr=1e-12, rows_per_dim=None, refresh=1, ema_decay=decay)
    for k in range(5):
        batch = points(16, k, torch.float64)
        rows = torch.cat([batch[0], torch.ones(16, 1)], 1)
        values.append(rows.T @ rows / 16)
        keep = min(decay, k / (k + 1))
        expected = values[-1] if expected is None else keep * expected + (1 - keep) * values[-1]
        backward(model, batch)
        opt.step()
        opt.zero_grad()
        torch.testing.assert_close(statistic(opt, "0", "A")[0], expected)


def test_a_new_damping_acts_when_it_is_telling():
    model, batch = mlp(), points(16, 0)
    opt = natgrad.SPNGD(model, lr=1e-12, damping=1e-2, rows_per_dim=None, refresh=100)
    inverses = []
    for damping in (1e-2, 1.05e-2, 2e-2):
        opt.param_groups[0]["damping"] = damping
        backward(model, batch)
        opt.step()
        opt.zero_grad()
        inverses.append(statistic(opt, "0", "A_inverse").clone())
    assert torch.equal(inverses[0], inverses[1])
    assert float(inverses[2].norm()) < float(inverses[0].norm())
