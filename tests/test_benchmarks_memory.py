"""What optimizers keep: counted as it is held, and little more than half of what three squares took."""

import copy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import in_parts
import natgrad
from helpers import quiet
from natgrad.parallel import World, local_of, mesh_of, run_threads, shard
from natgrad_lab.models import Mlp
from natgrad_lab.plan.scaling import Network
from natgrad_lab.train.optimizers import SpNgd

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import memory
import sharded as counts

SMALL = memory.Net(lambda: Mlp((200, 30)).build((1, 4, 40), 10), lambda: torch.zeros(1, 1, 4, 40, device="meta"))


@pytest.mark.parametrize("kind", ["SP-NGD", "K-FAC"])
@pytest.mark.parametrize(("name", "share"), [("ResNet-50", 0.55), ("GPT-2 small", 0.57)])
def test_a_state_takes_little_more_than_half_of_what_squares_took(name, share, kind):
    """A weight that is shared by lookup and head has a curvature, whose vectors are no smaller than before."""
    net = memory.NETS[name]
    model = memory.on_meta(net)
    optimizer = quiet(memory.OURS[kind], model, 0.1, world=World(memory.Silent(1)))
    (held,) = memory.of_ours(optimizer, model, net.sample())
    now = sum(held.values())
    assert now <= share * memory.as_squares(optimizer, now)
    assert now > held["momentum"] + held["A_inverse"] > 0


@pytest.mark.parametrize("name", ["SP-NGD", "K-FAC", "NLCG"])
def test_what_is_counted_is_what_ranks_hold(name):
    """On two ranks that are there."""
    net = SMALL

    def held(world):
        optimizer = memory.OURS[name](net.build(), lr=0.1, world=world)
        return sum(memory.size_of(v) for state in optimizer.state.values() for v in state.values())

    model = memory.on_meta(net)
    optimizer = memory.OURS[name](model, lr=0.1, world=World(memory.Silent(2)))
    counted = [sum(own.values()) for own in memory.of_ours(optimizer, model, net.sample())]
    assert counted == run_threads(2, held)


def test_the_rows_of_seng_are_those_of_its_samples():
    net, samples = SMALL, 6
    model = memory.on_meta(net)
    optimizer = natgrad.SENG(model, 0.1, samples=samples, world=World(memory.Silent(1)))
    (counted,) = memory.of_ours(optimizer, model, net.sample())
    real = net.build()
    seng = natgrad.SENG(real, 0.1, samples=samples)
    nn.functional.cross_entropy(real(torch.randn(samples, 1, 4, 40)), torch.arange(samples)).backward()
    seng.step()
    held = sum(memory.size_of(v) for state in seng.state.values() for v in state.values())
    assert sum(counted.values()) == pytest.approx(held, rel=0.05)


def test_a_table_has_every_optimizer(tmp_path):
    rows = quiet(partial(memory.counted, SMALL))
    lines = memory.table({"cases": [{"case": "a small one", "parameters": 40_000, "rows": rows}]}).splitlines()
    assert [line.split(" | ")[0] for line in lines[-8:]] == [f"| {name}" for name in (*memory.OTHERS, *memory.OURS)]
    packed = {row["optimizer"]: row for row in rows}["SP-NGD"]
    assert packed["squares"] > packed["held"]["1"][1] == packed["held"]["1"][0]
    assert packed["held"]["8"][1] < packed["held"]["1"][1]


def test_the_fullest_rank_is_the_one_that_holds_most():
    """Of a model that fully_shard has cut, on two ranks that are there."""
    settings = SpNgd()
    network = Network("a small one", SMALL.build, (1, 4, 40))
    start = SMALL.build()

    def held(world):
        model = shard(copy.deepcopy(start), mesh_of(2, "cpu"))
        optimizer = settings.build(model, world)
        states = [v for state in optimizer.state.values() for v in state.values()]
        return [sum(memory.size_of(local_of(v)) for v in values) for values in (model.parameters(), states)]

    real = in_parts.on_threads(2, held)
    planned = counts.by_rank(network, settings, 2, 1)
    assert [[own["parameters"], own["state"]] for own in planned] == real
    (row,) = [row for row in counts.counted(network, 2) if (row["optimizer"], row["how"]) == ("SP-NGD", "fully_shard")]
    assert sum(row["held"].values()) == max(2 * weights + state for weights, state in real)
