"""Layers whose statistics are inverted on several ranks, and what each of them holds."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import natgrad
from helpers import backward, clone, weights
from multi import share
from natgrad.curvature import Cost
from natgrad.optim.owners import place_layers
from natgrad.parallel import place_parts, run_threads
from natgrad.parallel.packing import packed_numel
from natgrad_lab.models.imagenet import ImageResNet

SIZES = (30, 20, 3)


@pytest.fixture
def tiny(monkeypatch):
    """Layers of any size are worth being split."""
    monkeypatch.setattr("natgrad.parallel.placement.WORTH", 0)


def big_and_small():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.LayerNorm(20), nn.Linear(20, 3)).double()


def batch(k):
    generator = torch.Generator().manual_seed(k)
    return torch.randn(12, 30, generator=generator).double(), torch.randint(3, (12,), generator=generator)


def spngd(model, world, **options):
    return natgrad.SPNGD(model, **{"lr": 0.05, "rows_per_dim": None, "refresh": 2, "world": world, **options})


def trained(world, start, steps, **options):
    model = clone(start)
    opt = spngd(model, world, **options)
    for k in range(steps):
        backward(model, share(batch(k), world))
        opt.step()
        opt.zero_grad()
    return model, opt


def test_only_what_holds_everybody_up_is_split(tiny):
    assert place_parts([[8.0, 1.0], [2.0, 2.0], [1.0]], 2) == [[0, 1], [1, 1], [1]]
    assert place_parts([[8.0, 1.0], [2.0, 2.0], [1.0]], 1) == [[0, 0], [0, 0], [0]]
    assert place_parts([], 3) == []


def test_small_parts_are_not_worth_a_message():
    assert place_parts([[1e9, 1e6]], 2) == [[0, 0]]
    assert place_parts([[1e9, 1e8]], 2) == [[0, 1]]


def test_the_owner_inverts_the_dearest_statistic(tiny):
    costs = [Cost(0.0, {"A": 5.0, "G": 50.0}, 1.0, 0), Cost(0.0, {"F": 3.0}, 1.0, 0), Cost(0.0, {}, 1.0, 0)]
    (owner, holders), (second, single), (_, none) = place_layers(costs, SimpleNamespace(size=2, rank=0, owners=True))
    assert holders["G"] == owner != holders["A"]
    assert single == {"F": second}
    assert none == {}


def test_one_large_factor_does_not_hold_a_resnet50s_step():
    """Spec 8.7: of all inversions a single 4608 inverse is 22 %; whole layers would add its G to it."""
    with torch.device("meta"):
        model = ImageResNet(depth=50).build((3, 224, 224), 1000)
    costs = [
        natgrad.curvature.Kronecker(8).cost(layer, 4096)
        for layer in (natgrad.layers.layer_of(m) for m in model.modules() if isinstance(m, nn.Conv2d))
    ]
    for ranks in (16, 64, 107):
        loads = [0.0] * ranks
        for cost, (owner, holders) in zip(costs, place_layers(costs, SimpleNamespace(size=ranks, rank=0, owners=True))):
            loads[owner] += cost.precondition
            for key, holder in holders.items():
                loads[holder] += cost.factors[key]
        dearest = max(max(c.factors.values()) + c.precondition for c in costs)
        assert max(loads) <= max(dearest, 4 / 3 * sum(loads) / ranks)


def test_each_rank_holds_its_part_and_only_inverses_travel(tiny):
    start = big_and_small()

    def work(world):
        _, opt = trained(world, start, 1)
        cell = opt.cells[0]
        return cell.owner, cell.holders, set(cell.state()), opt.traffic()

    results = run_threads(2, work)
    owner, holders, _, traffic = results[0]
    other = 1 - owner
    assert holders == {"A": owner, "G": other}
    everywhere = {"step", "A_clock", "A_damping", "G_clock", "G_damping"}
    assert results[owner][2] == everywhere | {"A", "A_inverse", "G_inverse", "momentum", "gradients", "went"}
    assert results[other][2] == everywhere | {"G"}
    assert traffic["inverses"] == 8 * packed_numel((1, 20, 20), True)


def test_a_new_damping_acts_on_every_rank(tiny):
    start, ends = big_and_small(), []
    for ranks in (1, 2, 3):

        def work(world):
            model, opt = trained(world, start, 1, refresh=100)
            opt.param_groups[0]["damping"] = 0.5
            backward(model, share(batch(1), world))
            opt.step()
            return weights(model)

        ends.append(run_threads(ranks, work)[0])
    for end in ends[1:]:
        assert_close(end, ends[0], rtol=1e-9, atol=1e-12)


def test_states_move_between_worlds(tiny):
    """A state saved on two ranks goes on alone and on three, as if nothing had happened."""
    start = big_and_small()

    def first(world):
        model, opt = trained(world, start, 3)
        return model, opt.gather_state_dict()

    def second(world, model, saved):
        model = clone(model)
        opt = spngd(model, world)
        opt.load_state_dict(saved)
        for k in range(3, 6):
            backward(model, share(batch(k), world))
            opt.step()
            opt.zero_grad()
        return weights(model)

    expected = weights(run_threads(1, lambda world: trained(world, start, 6)[0])[0])
    model, saved = run_threads(2, first)[1]
    for ranks in (1, 2, 3):
        ends = run_threads(ranks, lambda world: second(world, model, saved))
        assert_close(ends[0], expected, rtol=1e-9, atol=1e-12)
        assert all(torch.equal(end, ends[0]) for end in ends)
