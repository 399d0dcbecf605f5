"""Operations of a planned step are those that a real step issues, and what would shorten a step is planned like it."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from helpers import quiet
from natgrad.parallel import Message, World
from natgrad_lab.models import CifarResNet
from natgrad_lab.models.imagenet import ImageResNet
from natgrad_lab.plan.links import levels, one
from natgrad_lab.plan.machine import Link, Spent
from natgrad_lab.plan.machines import named
from natgrad_lab.plan.remedies import Remedies, in_words, remedies
from natgrad_lab.plan.simulated import Device
from natgrad_lab.plan.stages import Ways
from natgrad_lab.train.optimizers import Sgd, SpNgd
from planned import BATCH, CLASSES, NET, SETTINGS, SHAPE, planner

NEVER = 10**6
CURVED = {name: settings for name, settings in SETTINGS.items() if name not in ("sgd", "adamw")}


def issued(settings):
    """Operations of a step in which nothing is measured, on one rank with numbers."""
    torch.manual_seed(0)
    model = NET.build(SHAPE, CLASSES)
    optimizer = quiet(settings.build, model, World.alone())
    x, y = torch.randn(BATCH, *SHAPE), torch.randint(0, CLASSES, (BATCH,))
    for _ in range(3):
        loss = cross_entropy(model(x), y)
        loss.backward()
        with Device() as counted, quieted(counted) as again:
            settings.take(optimizer, loss.detach(), lambda: again(lambda: model(x)))
        optimizer.zero_grad()
    return counted.operations


class quieted:  # noqa: N801
    """More passes over the network do not count, as in a rehearsal."""

    def __init__(self, device):
        self.device = device

    def __enter__(self):
        return self.run

    def __exit__(self, *_):
        return None

    def run(self, work):
        with self.device.uncounted():
            return work()


@pytest.mark.parametrize("name", CURVED)
def test_a_planned_step_issues_what_a_real_one_does(name):
    """But for reads, which are copies from a device and nothing on a processor."""
    settings = SETTINGS[name]
    if getattr(settings, "preconditioner", "kronecker") == "kronecker":
        settings = replace(settings, refresh=NEVER)
    planned = planner().account(settings, 1, BATCH).rehearsal.step(False).launches
    assert sum(planned.values()) == pytest.approx(issued(settings), rel=0.08, abs=6)


def test_a_step_of_more_layers_issues_no_more():
    few, many = (
        planner(CifarResNet(depth, (8, 16, 16))).account(SpNgd(refresh=NEVER), 1, BATCH).launches(False)
        for depth in (8, 32)
    )
    assert sum(many.values()) == sum(few.values())


def test_directions_in_a_graph_are_one_launch():
    account = planner(machine="h100").account(SpNgd(refresh=NEVER), 1, BATCH)
    graph = replace(account, ways=Ways(graph=True))
    assert graph.launches(False)["preconditioning"] == 1 < account.launches(False)["preconditioning"]
    assert graph.launches(True) == account.launches(True)
    assert sum(graph.stages(False)[0].values()) < sum(account.stages(False)[0].values())


def test_a_stage_waits_for_the_slower_one():
    assert Spent(2.0, 1.0, 0.5, beside=True).seconds == 2.5
    assert Spent(2.0, 1.0, 0.5, beside=True).parts == {"device": 2.0, "host": 0.0, "links": 0.5}
    assert Spent(2.0, 1.0, 0.5).seconds == 3.5
    assert sum(Spent(2.0, 1.0, 0.5).parts.values()) == 3.5


def test_two_levels_wait_for_fewer_latencies():
    machine = replace(named("v100-ib"), call=0.0, inside=Link(1e-6, 1e11), between=Link(1e-5, 1e10), devices=4)
    even = Message("reduce_scatter", "x", (100,) * 16)
    inside = 3 * 1e-6 + 1600 / 1e11 * 3 / 4
    assert levels(even, machine, 16, 4) == pytest.approx(inside + 3 * 1e-5 + 1600 / 1e10)
    assert levels(even, machine, 16, 16) == one(even, machine, 16)
    total = Message("all_reduce", "x", (100,))
    assert levels(total, machine, 16, 4) == one(total, machine, 16)


@pytest.fixture(scope="module")
def held():
    return Remedies(planner(ImageResNet(18), (3, 64, 64), 10, "h100"), SpNgd(rows_per_dim=None), 512, 2048, 0.1)


def test_what_holds_a_step_adds_up(held):
    stale, fresh = (sum(held.now.account.stages(kind)[0].values()) for kind in (False, True))
    assert sum(held.now.by_cause().values()) == pytest.approx(stale + 0.1 * (fresh - stale))
    rows = held.holds()
    assert rows == sorted(rows, key=lambda row: -row["more"])
    assert {row["stage"] for row in rows} >= {"gather", "statistics"}


def test_a_change_is_worth_what_its_settings_come_to(held):
    for change, made in held.alone():
        if change.settings:
            settings = replace(held.now.settings, **change.settings)
            again = held.planner.account(settings, held.ranks, held.batch)
            stale, fresh = (sum(again.stages(kind)[0].values()) for kind in (False, True))
            # tables that a first pass makes are there in the second
            assert made.seconds() == pytest.approx(stale + 0.1 * (fresh - stale), rel=1e-2)
        else:
            assert made.seconds() <= held.now.seconds()


def test_remedies_are_found_in_words(held):
    found = remedies(held.planner, held.now.settings, held.ranks, held.batch, 0.1)
    seconds = [found["now"], *(row["seconds"] for row in (*found["settings"], *found["ways"]))]
    assert seconds == sorted(seconds, reverse=True)
    assert found["settings"][0]["line"] == "--optimizer.per-host 8"  # a ring of 512 latencies costs most
    said = " ".join(in_words(found, "SP-NGD"))
    assert "On 512 ranks" in said
    assert "gather for the links" in said
    assert found["settings"][-1]["line"] in said


def test_the_interval_is_the_shortest_that_reaches_the_target(held):
    near = Remedies(held.planner, held.now.settings, held.ranks, held.batch, 0.1, held.now.seconds(0.3) / held.base)
    steps = near.interval(near.now)
    assert steps == 4
    assert near.now.seconds(1 / steps) <= near.target * near.base < near.now.seconds(1 / (steps - 1))
    far = Remedies(held.planner, held.now.settings, held.ranks, held.batch, 0.1, 0.5)
    assert far.interval(far.now) is None


def test_sgd_has_no_remedies():
    assert remedies(planner(machine="h100"), Sgd(), 8, 64, 0.1) is None
