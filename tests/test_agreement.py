"""World(check=N): ranks that have drifted apart are found in the step in which they are compared, and named."""

import copy
import math

import pytest
import torch
from torch import nn

import natgrad
from helpers import Mixed, backward
from in_parts import OPTIMIZERS
from natgrad.parallel import RanksDifferError, World, run_threads
from natgrad.parallel.agreement import digest, minority
from natgrad_lab.data import Digits
from natgrad_lab.models import Mlp
from natgrad_lab.train.loop import prepare, steps
from natgrad_lab.train.optimizers import AdamW, SpNgd
from natgrad_lab.train.recipe import Recipe

EVERY = {
    **OPTIMIZERS,
    "budget": lambda m, **o: natgrad.SPNGD(m, lr=0.02, damping=0.03, refresh=natgrad.Budget(0.1), **o),
    "kfac directions": lambda m, **o: natgrad.KFAC(m, lr=0.02, damping=0.03, refresh=3, gather="directions", **o),
    "nlcg told": lambda m, **o: natgrad.NLCG(m, lr=0.05, **o),
    "curvature step": lambda m, **o: natgrad.NLCG(
        m, preconditioner=natgrad.spngd_blocks, step=natgrad.CurvatureStep(), **o
    ),
}


@pytest.fixture
def model(double):
    torch.manual_seed(0)
    return Mixed()


def train(world, model, build, count, hurt=None):
    """Steps on this rank's share; `hurt` is called on the last rank after the third."""
    model = copy.deepcopy(model)
    optimizer = build(model, world=world)
    for k in range(count):
        x, y = (t.chunk(world.size)[world.rank] for t in Mixed.batch(24, k))
        loss = backward(model, (x, y))
        told = isinstance(optimizer, natgrad.NLCG) and optimizer.search.feedback is not None
        looks = isinstance(getattr(optimizer, "search", None), natgrad.CurvatureStep)
        options = {"forward": lambda x=x: model(x)} if looks else {"loss": loss} if told else {}
        optimizer.step(**options)
        optimizer.zero_grad()
        if hurt is not None and k == 2 and world.rank == world.size - 1:
            hurt(model, optimizer)
    return optimizer


@pytest.mark.parametrize("owners", [None, False])
@pytest.mark.parametrize("name", EVERY)
def test_ranks_that_agree_raise_no_alarm(model, name, owners):
    """20 steps of every optimizer, on one message of 32 bytes a check."""

    def work(world):
        return train(world, model, EVERY[name], 20).traffic()

    if owners is False and name == "kfac directions":
        owners = None  # owners send directions
    for traffic in run_threads(2, work, check=2, owners=owners):
        assert traffic["check"] == 32
    assert "check" not in run_threads(2, work, owners=owners)[0]


def next_weight(name):
    def hurt(model, optimizer):
        weight = model.get_parameter(name).data.view(-1)
        weight[1] = torch.nextafter(weight[1], torch.tensor(math.inf))

    return hurt


def a_step_more(model, optimizer):
    optimizer.storage.table("step").add(1)


def another_clock(model, optimizer):
    cell = next(c for c in optimizer.cells if c.name == "conv")
    due, *rest = cell.clock("A")
    cell.set_clock("A", [due + 40, *rest])


def next_number(key):
    def hurt(model, optimizer):
        group = optimizer.param_groups[0]
        group[key] = math.nextafter(group[key], math.inf)

    return hurt


@pytest.mark.parametrize(
    ("hurt", "found"),
    [
        (next_weight("embed.weight"), "the weights of embed.weight"),
        (next_weight("head.bias"), "the weights of head.bias"),
        (a_step_more, "step of gain"),
        (another_clock, "A_clock of conv.weight"),
        (next_number("lr"), "param_groups[0]['lr']"),
        (next_number("damping"), "param_groups[0]['damping']"),
    ],
)
def test_what_differs_by_a_bit_is_named_and_the_rank(model, hurt, found):
    """All ranks make every step themselves, so nothing that one of them does is undone by an owner."""

    def work(world):
        optimizer = train(world, model, EVERY["kfac"], 3, hurt)
        with pytest.raises(RanksDifferError) as raised:
            optimizer.compare_ranks()
        return raised.value

    for error in run_threads(3, work, owners=False):
        assert error.name == found
        assert error.ranks == (2,)
        assert "rank 2 differs from the other ranks in" in str(error)
        assert "\n" not in str(error)


def test_what_owners_own_is_put_right_by_them_and_the_rest_is_found(model):
    """The weight of a layer on a rank that does not own it is overwritten in the next step."""

    def work(world):
        hurt = next_weight("conv.weight")
        optimizer = train(world, model, EVERY["kfac"], 3, hurt)
        owner = next(c for c in optimizer.cells if c.name == "conv").owner
        for k in range(3, 5):
            backward(optimizer._model, tuple(t.chunk(2)[world.rank] for t in Mixed.batch(24, k)))
            optimizer.step()
        return owner

    assert run_threads(2, work, check=4)


def test_ranks_with_unlike_optimizers_are_told_so(model):
    def work(world):
        mine = copy.deepcopy(model)
        optimizer = EVERY["kfac"](mine, world=World.alone())
        optimizer.world = world
        if world.rank == 1:
            optimizer.param_groups[0]["another"] = 1.0
        with pytest.raises(RanksDifferError, match="rank 1 and the others differ in what their optimizers are made of"):
            optimizer.compare_ranks()

    run_threads(3, work)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.bool]
)
def test_a_digest_knows_every_entry_and_its_place(dtype, monkeypatch):
    monkeypatch.setattr("natgrad.parallel.agreement.CHUNK", 7)
    value = (torch.arange(30) % 5).to(dtype).view(5, 6)
    known = {int(digest(value))}
    assert int(digest(value.clone())) in known
    for k in range(30):
        other = value.clone()
        other.view(-1)[k] = 1 - other.view(-1)[k] if dtype != torch.bool else ~other.view(-1)[k]
        changed = not torch.equal(other, value)
        assert (int(digest(other)) not in known) == changed
        known.add(int(digest(other)))
    assert int(digest(value.flip(0))) not in known
    assert torch.equal(value, (torch.arange(30) % 5).to(dtype).view(5, 6))


def test_most_ranks_are_right():
    assert minority([5, 5, 7, 5]) == [2]
    assert minority([5, 7]) == [1]
    assert minority([7, 5, 5, 9]) == [0, 3]


@pytest.mark.parametrize("optimizer", [SpNgd(lr=0.05), AdamW()], ids=["spngd", "adamw"])
def test_the_trainer_checks_any_optimizer(splits, optimizer):
    recipe = Recipe(Digits(), Mlp((16,)), optimizer, batch=200, steps=6)

    def work(world, hurt):
        job, taken = prepare(recipe, world, splits), []
        for step in steps(job):
            taken.append(step.step)
            if hurt and step.step == 3 and world.rank == 1:
                group = job.optimizer.param_groups[0]
                group["weight_decay"] = math.nextafter(group["weight_decay"], 1.0)
        return taken

    assert run_threads(2, lambda world: work(world, False), check=2) == [[1, 2, 3, 4, 5, 6]] * 2
    with pytest.raises(RanksDifferError, match=r"after step 4 rank 1 differs .* param_groups\[0\]\['weight_decay'\]"):
        run_threads(2, lambda world: work(world, True), check=2)


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_steps_between_checks_that_cannot_be(value):
    with pytest.raises(ValueError, match="check="):
        World(check=value)


def test_a_rank_alone_compares_nothing():
    model = nn.Linear(3, 2)
    optimizer = natgrad.SPNGD(model, lr=0.1, world=World(check=1))
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    assert "check" not in optimizer.traffic()
