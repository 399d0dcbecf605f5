"""A step spends at most its share on measuring and factoring, and what waits does not wait for ever."""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

import natgrad
from golden import Net, batch, filled
from helpers import Net as Small
from helpers import backward, clone, mlp, points, quiet, weights
from natgrad.budget import LEAST, Purse, Spending
from natgrad.curvature import Curvature
from natgrad.layer_state import LayerState
from natgrad.layers.op_cost import price
from natgrad.parallel import World, run_threads
from natgrad.refresh import Adaptive, Budget, Every, NextInterval, Staleness
from natgrad_lab.models import CifarResNet
from natgrad_lab.train.optimizers import SpNgd
from planned import planner

GENEROUS = 1e6
DAMPING = 0.1

# --- the choices by themselves, on layers that are nothing but numbers ---


@dataclass(frozen=True)
class Named:
    key: str


class Weightless(Curvature):
    """Two statistics and no formulas."""

    name, statistics = "weightless", (Named("A"), Named("G"))
    split = factor = precondition = dense = cost = None  # type: ignore[assignment]

    def __init__(self):
        pass


Weightless.__abstractmethods__ = frozenset()


@dataclass(frozen=True)
class Piece:
    """What one statistic takes: measuring, taking in, factoring; its holder, its interval, by how much it changes."""

    measuring: float
    taking: float
    factoring: float
    holder: int
    interval: int
    change: float


def works_of(*pieces):
    """The two pieces of work of a layer with these statistics."""
    everyone = sum(p.measuring for p in pieces)
    held = [sum(getattr(p, name) for p in pieces) for name in ("taking", "factoring")]
    return everyone + held[0], held[1]


def simulated(pieces, share, ranks, steps):
    """(what every step spent, the debts, the longest wait of any statistic, what was inverted how often)."""
    group, spent, debts, waits, made = {"debt": 0.0, "batch": ranks}, [], [], [0], {}
    cells = []
    for place, pair in enumerate(zip(pieces[::2], pieces[1::2])):
        numbers = {"passes": [1.0 if place == 0 else 0.0, 0.0]}
        for key, one in zip("AG", pair):
            numbers[f"{key}_clock"], numbers[f"{key}_damping"] = [0, 1, 1, 0], 0.0
            numbers[f"{key}_budget"] = [1.0, one.measuring, one.taking, one.factoring]
        holders = {key: one.holder for key, one in zip("AG", pair)}  # some layers are split over ranks
        cell = LayerState(str(place), None, Weightless(), 0, holders, dict, lambda: Every(1), numbers=numbers)
        cells.append(cell)
    of = {(c, k): p for c, pair in zip(cells, zip(pieces[::2], pieces[1::2])) for k, p in zip("AG", pair)}
    purse = Purse(Budget(share), lambda: [group], sampled=False)
    spending = Spending(cells, World(), purse)
    spending.world = SimpleNamespace(size=ranks)  # all that is asked of it
    for step in range(1, steps + 1):
        due = {k: own for k, c in enumerate(cells) if (own := c.due(step))}
        fresh = {k: {one.key for one in own} for k, own in spending.measure(step, due).items()}
        for k, keys in fresh.items():
            for key in keys:
                waits.append(cells[k].waited(key, step))
                cells[k].arrive(key, step)
        jobs = [(k, key) for k, c in enumerate(cells) for key in c.outdated(DAMPING, fresh.get(k, set()))]
        for k, key in spending.invert(jobs):
            cells[k].numbers[f"{key}_damping"] = DAMPING
            made[k, key] = made.get((k, key), 0) + 1
        for k, keys in fresh.items():
            for key in keys:
                cells[k].advance(key, step, of[cells[k], key].interval)
                spending.changed(k, key, of[cells[k], key].change)
        spent.append(purse.spent)
        debts.append(group["debt"])
    waits += [c.waited(key, steps) for c in cells for key in c.keys]
    return spent, debts, max(waits), made


WORKS = st.floats(1e-4, 2.0)
PIECES = st.builds(Piece, WORKS, WORKS, WORKS, st.integers(0, 3), st.integers(1, 30), st.floats(0, 3))
LAYERS = st.lists(PIECES, min_size=2, max_size=16).filter(lambda p: len(p) % 2 == 0)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(LAYERS, st.floats(0.01, 2.0))
def test_no_step_and_no_run_of_steps_spends_more_than_its_share(pieces, share):
    steps = 200
    spent, debts, *_ = simulated(pieces, share, 4, steps)
    largest = max(work for pair in zip(pieces[::2], pieces[1::2]) for work in works_of(*pair))
    near = 1 + 1e-9
    assert max(spent) <= max(share, largest) * near
    for first in (0, 1, 57):
        for last in (first + 1, first + 20, steps):
            assert sum(spent[first:last]) <= (share * (last - first) + largest) * near
    assert max(debts) <= largest * near


CROWD = st.lists(st.tuples(st.floats(0.3, 2), st.floats(0.3, 2), st.floats(0, 1)), min_size=2, max_size=3)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(CROWD)
def test_nothing_starves_though_everything_is_due_in_every_step(crowd):
    """While a layer waits for w steps, each other one is served about 1 / LEAST (1 + log(w LEAST)) times."""
    pieces = [
        Piece(measuring / 2, 0, factoring / 2, 0, 1, change) for measuring, factoring, change in crowd for _ in "AG"
    ]
    _, _, longest, made = simulated(pieces, 1.0, 1, 1500)
    rounds = sum(math.ceil(work) for measuring, factoring, _ in crowd for work in (measuring, factoring))
    assert longest <= rounds / LEAST * (1 + math.log1p(longest * LEAST)) < 1200
    assert len(made) == len(pieces)
    assert min(made.values()) >= 3


def test_a_still_layer_and_a_large_one_get_their_turn():
    moving = [Piece(0.1, 0, 0.4, 0, 1, 1.0)] * 6
    *_, made = simulated([*moving, *[Piece(0.1, 0, 0.4, 0, 1, 0.0)] * 2], 1.0, 1, 400)
    assert made[3, "A"] > 400 / 4 / 8
    *_, made = simulated([*moving, *[Piece(0.75, 0, 0.1, 0, 1, 1.0)] * 2], 1.0, 1, 400)
    assert made[3, "A"] > 400 / 4 / 8


@settings(deadline=None, derandomize=True, max_examples=50)
@given(LAYERS)
def test_where_everything_fits_nothing_waits(pieces):
    _, debts, longest, made = simulated(pieces, GENEROUS, 4, 60)
    assert longest == max(debts) == 0
    for (k, key), count in made.items():
        assert count == len(range(1, 61, pieces[2 * k + (key == "G")].interval))


def test_what_changes_most_is_measured_most():
    still, moving = Piece(0.5, 0, 0, 0, 1, 0.0), Piece(0.5, 0, 0, 0, 1, 1.0)
    *_, made = simulated([still, still, moving, moving], 1.0, 1, 900)
    counts = [made[place, "A"] for place in (0, 1)]
    assert 5 <= counts[1] / counts[0] <= 1 / LEAST


def test_holders_work_side_by_side():
    """The factors of four layers on four ranks take one step, on one rank four."""
    counts = []
    for holders in ((0, 1, 2, 3), (0, 0, 0, 0)):
        pieces = [Piece(1e-6, 0, 0.5, rank, 10, 1.0) for rank in holders for _ in "AG"]
        spent, *_ = simulated(pieces, 1.1, 4, 39)
        assert max(spent) <= 1.1
        counts.append(sum(one > 0.5 for one in spent))
    assert counts == [3, 12]


def test_factors_of_one_layer_are_inverted_in_one_step():
    """Though one of them would fit; on two ranks they are."""
    for second, most in ((0, 1.2), (1, 0.6)):
        pieces = [Piece(1e-6, 0, 0.6, 0, 10, 1.0), Piece(1e-6, 0, 0.6, second, 10, 1.0)]
        spent, _, _, made = simulated(pieces, 1.0, 2, 39)
        assert max(spent) == pytest.approx(most, abs=1e-4)
        assert sum(one > 0.5 for one in spent) == 3
        assert set(made.values()) == {4}


def test_what_is_larger_than_the_limit_is_paid_back_before_anything_else():
    large, small = Piece(0.5, 0, 0, 0, 1, 1.0), Piece(0.005, 0, 0, 0, 1, 1.0)
    spent, debts, *_ = simulated([large, large, small, small], 0.1, 1, 40)
    (place, *_) = (k for k, one in enumerate(spent) if one >= 1)
    assert spent[place] == 1.0
    assert debts[place] == pytest.approx(0.9)
    assert spent[place + 1 : place + 9] == [0.0] * 8


@given(st.integers(0, 2**52), st.floats(0, 10))
def test_an_interval_and_a_change_are_told_as_one_number(interval, change):
    told = NextInterval.unpacked(NextInterval(interval, change).packed())
    assert told.interval == interval
    assert 0 <= NextInterval(interval, change).packed() < 2**63
    if interval:
        assert told.change == pytest.approx(min(change, 1.0), abs=5e-4 + 1e-12)


# --- in training ---


def spngd(model, refresh, world=None, **options):
    return natgrad.SPNGD(model, 0.05, refresh=refresh, damping=0.03, world=world, **options)


def resnet():
    torch.manual_seed(0)
    return CifarResNet(8, (8, 16, 16)).build((3, 12, 12), 10)


def images(step, n=24):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(n, 3, 12, 12, generator=generator), torch.randint(0, 10, (n,), generator=generator)


def steps(opt, model, numbers, world=None, data=images):
    """Trains; gives for each step what was measured, what was spent, and the debt."""
    told = []
    for step in numbers:
        x, y = data(step)
        if world is not None:
            x, y = (part.chunk(world.size)[world.rank] for part in (x, y))
        planned = list(opt.engine._plan)
        output = model(x)
        if opt.engine.sampled:
            opt.sample(output)
        cross_entropy(output, y).backward()
        opt.step()
        opt.zero_grad()
        told.append((planned, opt.spent, opt.param_groups[0].get("debt")))
    return told


KINDS = {
    "SPNGD": lambda m, r, w: spngd(m, r, w),
    "every row": lambda m, r, w: spngd(m, r, w, rows_per_dim=None),
    "sampled labels": lambda m, r, w: spngd(m, r, w, fisher="sampled"),
    "KFAC": lambda m, r, w: natgrad.KFAC(m, 0.05, refresh=r, world=w),
    "eigenvectors": lambda m, r, w: spngd(
        m, r, w, curvature=natgrad.LayerBlocks(natgrad.curvature.EigenKronecker, natgrad.curvature.Full)
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("then", [Adaptive(), 3, Adaptive(tolerance=0.02)])
def test_a_generous_budget_is_its_rule_to_the_last_bit(kind, then):
    found = []
    for refresh in (then, Budget(GENEROUS, then)):
        model = resnet()
        opt = KINDS[kind](model, refresh, World())
        told = steps(opt, model, range(9))
        found.append((weights(model), opt.intervals(), [planned for planned, *_ in told]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


@pytest.mark.parametrize(
    ("kind", "ranks", "share"),
    [
        *(("SPNGD", ranks, share) for ranks in (1, 2, 4) for share in (0.05, 0.5)),
        ("every row", 2, 0.5),
        ("every row", 4, 0.05),
        ("KFAC", 2, 0.05),
    ],
)
def test_every_rank_decides_alike_and_no_step_takes_more_than_it_may(kind, ranks, share):
    def work(world):
        model = resnet()
        opt = quiet(KINDS[kind], model, Budget(share, 1), world)
        told = steps(opt, model, range(40), world)
        return told, weights(model), largest_of(opt)

    results = run_threads(ranks, work, gradients="local")
    told, first, largest = results[0]
    for other in results[1:]:
        assert other[0] == told
        assert torch.equal(other[1], first)
    spent = [one for _, one, _ in told]
    assert len(told[0][0]) >= 20  # the first measurement has no limit
    assert spent[0] == 0
    assert max(spent) <= max(share, largest) * (1 + 1e-9)
    assert share * 10 < sum(spent) <= share * len(spent) + largest
    assert len({key for planned, *_ in told[1:] for key in planned}) > 5


def largest_of(opt, factors=False):
    """The largest piece of work of any layer in steps; of factoring alone."""
    works = []
    for cell in opt.cells:
        pieces = [Piece(*cell.numbers[f"{key}_budget"][1:], cell.holders[key], 1, 1.0) for key in cell.keys]
        works += works_of(*pieces)[factors:]
    return max(works) / opt.engine.spending.passes


def test_a_backward_pass_of_drawn_labels_is_owed():
    model = resnet()
    opt = spngd(model, Budget(0.1, 1), fisher="sampled")
    told = steps(opt, model, range(30))
    fee = opt.engine.spending.fee / opt.engine.spending.passes
    assert 0.2 < fee < 0.4
    for planned, spent, _ in told[1:]:
        assert (spent > fee) == bool(planned)
    assert sum(spent for _, spent, _ in told) <= 0.1 * 30 + fee + largest_of(opt)
    assert sum(bool(planned) for planned, *_ in told) > 5


def test_what_is_counted_is_what_the_planner_counts():
    """Of one rank and of two, with drawn labels and without: a trace of the network on no numbers, added up."""
    for ranks, fisher in ((1, "empirical"), (2, "empirical"), (1, "sampled")):

        def work(world, fisher=fisher):
            model = CifarResNet(8, (8, 16, 16)).build((3, 16, 16), 10)
            opt = quiet(spngd, model, Budget(0.05, 1), world, fisher=fisher)
            x, y = torch.randn(64 // world.size, 3, 16, 16), torch.zeros(64 // world.size, dtype=torch.long)
            steps(opt, model, range(1), data=lambda _: (x, y))
            told = {c.name: {k: list(c.numbers[f"{k}_budget"]) for k in c.keys} for c in opt.cells}
            return told, {c.name: c.numbers["passes"] for c in opt.cells}, opt.engine.spending.passes

        torch.manual_seed(0)
        told, passes, of_a_step = run_threads(ranks, work, gradients="local")[0]
        account = planner().account(SpNgd(refresh=1), ranks, 64)
        (trace, _), seen = account.parts.passes[0], account.parts.seen
        cells = {cell.name: cell for cell in account.cells}
        total = 0.0
        for call in trace.calls:
            backward = price(() if call.first else call.passes.inputs)
            own = price(call.passes.forward) + price(call.passes.weights) + backward
            assert passes[call.name] == pytest.approx([own * ranks / 64, backward * ranks / 64])
            total += own
            cell = cells[call.name]
            for key in cell.keys:
                measuring = price(cell.curvature.measure_work(call.layer, key, call.x, call.y, ranks))
                factoring = price(cell.curvature.factor_work(cell.layer, key, seen[call.name]))
                assert told[call.name][key][1] == pytest.approx(measuring)
                assert told[call.name][key][3] == pytest.approx(factoring)
        assert of_a_step == pytest.approx(total)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("then", [1, Adaptive(tolerance=0.05)])
def test_a_run_that_was_stopped_decides_as_one_that_was_not(ranks, then):
    """At every step of a while, so with debts, and with inverses that wait."""

    def work(world):
        model = resnet()
        opt = quiet(spngd, model, Budget(0.04, then), world)
        saved = []
        for step in range(16):
            told = steps(opt, model, [step], world)[0]
            state = quiet(opt.gather_state_dict) if world.size > 1 else opt.state_dict()
            saved.append((told, copy.deepcopy(state), clone(model).state_dict()))
        owed = [told[2] for told, *_ in saved]
        states = [list(one["state"].values()) for _, one, _ in saved]
        waiting = [any(float(s.get(f"{key}_damping", 0)) < 0 for s in own for key in "AGF") for own in states]
        for begin in (1, 4, 7, 10):
            other = resnet()
            other.load_state_dict(saved[begin][2])
            again = quiet(spngd, other, Budget(0.04, then), world)
            again.load_state_dict(copy.deepcopy(saved[begin][1]))
            told = steps(again, other, range(begin + 1, 16), world)
            assert told == [one[0] for one in saved[begin + 1 :]]
            assert torch.equal(weights(other), weights(model))
        return owed, waiting

    owed, waiting = run_threads(ranks, work, gradients="local")[0]
    assert any(owed)
    assert any(waiting)


def test_what_a_budgeted_step_takes_is_what_an_unlimited_one_has():
    """Statistics measured in a step are those of that step to the last bit; inverses are those of the statistics."""
    model, other = resnet().double(), resnet().double()
    own = natgrad.SPNGD(model, 1e-30, refresh=Budget(0.3, 1), rows_per_dim=None, damping=0.03)
    every = natgrad.SPNGD(other, 1e-30, refresh=1, rows_per_dim=None, damping=0.03)
    compared = inverted = 0
    for step in range(25):
        x, y = images(step)
        planned = [(own.cells[k].name, key) for k, key in own.engine._plan]
        before = {(c.name, k): c.state()[f"{k}_inverse"].clone() for c in own.cells for k in c.keys}
        for opt, net in ((own, model), (every, other)):
            cross_entropy(net(x.double()), y).backward()
            opt.step()
            opt.zero_grad()
        there = {c.name: c for c in every.cells}
        for cell in own.cells:
            for key in cell.keys:
                value, inverse = cell.square(key), cell.state()[f"{key}_inverse"]
                if (cell.name, key) in planned:
                    assert torch.equal(value, there[cell.name].square(key))
                    compared += 1
                if not torch.equal(before[cell.name, key], inverse):
                    parts = cell.curvature.split({k: cell.trace(k) for k in cell.keys}, 0.03)[key]
                    damped = value + torch.diag_embed(parts[:, None].expand(value.shape[:2]))
                    torch.testing.assert_close(inverse, torch.linalg.inv(damped))
                    inverted += 1
    assert compared > 60
    assert inverted > 60
    assert compared < 24 * len(before)  # not all of every step


def test_a_rule_hears_how_many_steps_really_lie_between_two_measurements():
    heard = []

    @dataclass(frozen=True)
    class Listening(Staleness):
        def next(self, memory):
            heard.append((memory.interval, memory.previous))
            return 2

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    opt = natgrad.KFAC(model, 1e-3, refresh=Budget(0.5, Listening()))
    when = {"A": [], "G": []}
    order = []
    for step in range(1, 40):
        for _, key in opt.engine._plan:
            when[key].append(step)
            order.append((key, len(when[key]) - 1))
        backward(model, (points(8, step)[0], points(8, step)[1]))
        opt.step()
        opt.zero_grad()
    gaps = {key: [1, *(b - a for a, b in pairwise(own))] for key, own in when.items()}
    assert any(gap > 2 for own in gaps.values() for gap in own)
    assert len(heard) == len(order) > 6
    for (key, k), (interval, previous) in zip(order, heard):
        assert interval == gaps[key][k]
        assert previous == ([1, *gaps[key]][k])


def test_a_new_damping_acts_on_all_in_time_and_not_at_once():
    model = resnet()
    opt = spngd(model, Budget(0.06, 10**6))
    steps(opt, model, range(2))
    opt.param_groups[0]["damping"] = 1.0

    def made():
        return sum(c.numbers[f"{k}_damping"] == 1.0 for c in opt.cells for k in c.keys)

    counts = [0]
    total = sum(len(c.keys) for c in opt.cells)
    largest = largest_of(opt, factors=True)
    for step in range(2, 60):
        ((_, spent, _),) = steps(opt, model, [step])
        counts.append(made())
        assert spent <= max(0.06, largest) * (1 + 1e-9)
        assert counts[-1] >= counts[-2]
    assert 0 < counts[1] < total
    assert counts[-1] == total


class Branches(nn.Module):
    """Two heads, of which one is used at a time."""

    def __init__(self):
        super().__init__()
        self.body, self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x, two):
        return (self.two if two else self.one)(torch.tanh(self.body(x)))


def test_a_layer_that_was_not_in_use_is_measured_at_once():
    torch.manual_seed(0)
    model = Branches()
    opt = natgrad.KFAC(model, 1e-3, refresh=Budget(1e-4, 1))
    measured = []
    for step in range(12):
        x, y = points(16, step)
        measured.append({opt.cells[k].name for k, _ in opt.engine._plan})
        cross_entropy(model(x, 4 <= step < 8), y).backward()
        opt.step()
        opt.zero_grad()
    assert measured[0] == {"body", "one", "two"}
    assert "two" in measured[5]  # asleep from the first step on, seen in step 4
    used = {c.name: c.numbers["A_damping"] for c in opt.cells}
    assert used["two"] != 0
    assert opt.cells[0].ready


def test_groups_keep_their_own_intervals_under_one_budget():
    model = mlp()
    groups = [{"params": model[0].parameters(), "refresh": 2}, {"params": model[2].parameters()}]
    opt = natgrad.SPNGD(model, lr=0.01, refresh=Budget(GENEROUS, 3), params=groups)
    shares = []
    for k in range(7):
        backward(model, points(8, k))
        opt.step()
        opt.zero_grad()
        shares.append(opt.refreshed)
    assert shares == [1.0, 0.0, 0.5, 0.5, 0.5, 0.0, 1.0]
    assert all(group["debt"] == 0 for group in opt.param_groups)


def test_a_state_of_before_the_budget_is_taken_and_counted_anew():
    model, other = resnet(), resnet()
    before = spngd(model, 1)
    steps(before, model, range(3))
    other.load_state_dict(model.state_dict())
    opt = spngd(other, Budget(0.1, 1))
    opt.load_state_dict(copy.deepcopy(before.state_dict()))
    told = steps(opt, other, range(3, 20))
    assert len(told[0][0]) == sum(len(c.keys) for c in opt.cells)  # nobody knows yet what they take
    assert max(spent for _, spent, _ in told) < 1
    assert opt.param_groups[0]["debt"] >= 0
    back = spngd(other, 1)
    back.load_state_dict(copy.deepcopy(opt.state_dict()))
    steps(back, other, range(20, 22))
    assert not any(c.spoilt(k) for c in back.cells for k in c.keys)


# --- other optimizers ---


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_of_layers_in_different_steps(ranks):
    """SENG measures and factors a layer at once; each layer's step is that of its own columns."""

    def work(world):
        model = filled(Net())
        opt = natgrad.SENG(model, 0.05, damping=0.5, refresh=Budget(0.2, 2), samples=None, sketch=None, world=world)
        told = []
        for step in range(12):
            x, y = (part.chunk(world.size)[world.rank] for part in batch(step))
            told.append((list(opt.engine._plan), opt.spent, opt.param_groups[0]["debt"]))
            cross_entropy(model(x, False), y).backward()
            opt.step()
            opt.zero_grad()
        assert not any(c.spoilt(k) for c in opt.cells for k in c.keys)
        return told, weights(model)

    results = run_threads(ranks, work, gradients="local")
    told = results[0][0]
    assert all(other[0] == told and torch.equal(other[1], results[0][1]) for other in results)
    sizes = {len(planned) for planned, *_ in told[1:]}
    assert 0 < max(sizes) < len(told[0][0])


def test_seng_with_a_generous_budget_is_seng():
    found = []
    for refresh in (2, Budget(GENEROUS, 2)):
        model = Small().double()
        torch.manual_seed(0)
        model.load_state_dict(Small().double().state_dict())
        opt = natgrad.SENG(model, 0.05, damping=0.5, refresh=refresh)
        for step in range(6):
            cross_entropy(model(Small.batch(16, step)[0]), Small.batch(16, step)[1]).backward()
            opt.step()
            opt.zero_grad()
        found.append(weights(model))
    assert torch.equal(*found)


def test_nlcg_with_a_curvature_under_a_budget():
    found = []
    for refresh in (1, Budget(GENEROUS, 1), Budget(0.05, 1)):
        model = resnet()
        opt = natgrad.NLCG(
            model,
            0.05,
            preconditioner=natgrad.spngd_blocks,
            step=natgrad.Scheduled(feedback=None),
            refresh=refresh,
        )
        told = steps(opt, model, range(8))
        found.append((weights(model), [len(planned) for planned, *_ in told]))
    assert torch.equal(found[0][0], found[1][0])
    assert max(found[2][1][1:]) < min(found[0][1])
    with pytest.raises(ValueError, match=r"refresh=.*says nothing"):
        natgrad.NLCG(resnet(), refresh=Budget())


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Budget(0), "share=0"),
        (lambda: Budget(float("nan")), "share=nan"),
        (lambda: Budget(True), "share=True"),
        (lambda: Budget(then=0), "refresh=0"),
        (lambda: Budget(then=Budget()), "one budget"),
        (lambda: natgrad.SENG(mlp(), 0.1, refresh=Budget(then=Adaptive())), "number of steps"),
        (lambda: natgrad.SENG(mlp(), 0.1, refresh=Budget(0.1, 2), block="network"), 'block="layer"'),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(build, says):
    with pytest.raises(ValueError, match=says) as refused:
        build()
    assert "\n" not in str(refused.value)
