"""NLCG's recipes against the release's rules, its network, its running means of the weights, and its settings."""

import copy
import math
from dataclasses import fields, replace
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import natgrad
from natgrad.optim.betas import BETAS
from natgrad.parallel import World, run_threads
from natgrad_lab.data import Digits
from natgrad_lab.data.images import Images
from natgrad_lab.models import Mlp, PreActResNet
from natgrad_lab.models.preactivation import PreActBlock
from natgrad_lab.recipes import find
from natgrad_lab.schedules import RootWarmUp
from natgrad_lab.train import loop
from natgrad_lab.train.average import Average
from natgrad_lab.train.loop import prepare, steps
from natgrad_lab.train.optimizers import Nlcg
from natgrad_lab.train.recipe import Recipe

# batch: (lr = 0.1 x batch / 256, steps of 200 epochs)
TABLE = {
    "128": (128, 0.05, 78_125),
    "256": (256, 0.1, 39_062),
    "512": (512, 0.2, 19_531),
    "1k": (1024, 0.4, 9_766),
    "2k": (2048, 0.8, 4_883),
    "4k": (4096, 1.6, 2_441),
    "8k": (8192, 3.2, 1_221),
    "16k": (16_384, 6.4, 610),
}


@pytest.mark.parametrize("size", TABLE)
def test_a_recipe_is_the_releases(size):
    recipe = find(f"cifar100_nlcg_{size}")()
    batch, lr, count = TABLE[size]
    assert (recipe.batch, recipe.steps, recipe.epochs) == (batch, count, 200)
    optimizer = recipe.optimizer
    assert isinstance(optimizer, Nlcg)
    assert optimizer.lr == pytest.approx(lr)
    assert (optimizer.weight_decay, optimizer.decay_norms, optimizer.mode) == (2e-4, False, "faithful")
    assert (optimizer.preconditioner, optimizer.beta, optimizer.feedback) == ("bfgs", "fletcher_reeves", "step")
    assert (optimizer.period, optimizer.tau, recipe.average) == (5, 1.0, 0.9999)
    for epoch in (0, 5, 12.5, 24, 25, 60, 101.9, 102, 152.9, 153, 199):
        warm = lr - (lr - 0.001) * math.sqrt(max(0.0, 1 - epoch / 25))
        drop = 1.0 if epoch < 102 else 0.1 if epoch < 153 else 0.01
        assert lr * recipe.schedule(epoch / 200) == pytest.approx(warm * drop, rel=1e-9)


def test_the_imagenet_recipe_follows_the_same_rules():
    recipe = find("imagenet_nlcg_64k")()
    assert (recipe.batch, recipe.steps, recipe.epochs) == (65_536, round(90 * 1_281_167 / 65_536), 90)
    assert recipe.optimizer.lr == pytest.approx(25.6)
    assert [recipe.schedule(t) for t in (0.125, 0.5, 0.52, 0.77)] == pytest.approx([1, 1, 0.1, 0.01])
    assert recipe.schedule(0) == pytest.approx(0.001 / 25.6)


def test_the_release_network_has_its_projections_and_its_size():
    model = PreActResNet(32).build((3, 32, 32), 100)
    blocks = [m for m in model.modules() if isinstance(m, PreActBlock)]
    assert [b.shortcut is not None for b in blocks] == [True, *[False] * 4] * 3
    assert [tuple(b.conv1.stride) for b in blocks] == [(2, 2) if k in (5, 10) else (1, 1) for k in range(15)]
    convs = 3 * 16 * 9 + 10 * 16 * 16 * 9 + (16 * 32 + 9 * 32 * 32) * 9 + (32 * 64 + 9 * 64 * 64) * 9
    shortcuts = 16 * 16 + 16 * 32 + 32 * 64
    norms = 2 * (10 * 16 + 16 + 9 * 32 + 32 + 9 * 64 + 64)
    assert sum(p.numel() for p in model.parameters()) == convs + shortcuts + norms + 64 * 100 + 100
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 100)
    weight = blocks[-1].conv2.weight
    assert weight.std().item() == pytest.approx((64 * 9) ** -0.5, rel=0.03)
    assert weight.abs().max().item() < 2.3 * (64 * 9) ** -0.5
    with pytest.raises(ValueError, match=r"depth=33 is not 6n \+ 2"):
        PreActResNet(33)


def test_root_warm_up_starts_and_ends_where_it_says():
    schedule = RootWarmUp(length=0.5, start=0.2)
    assert [schedule(t) for t in (0.0, 0.5, 1.0)] == pytest.approx([0.2, 1.0, 1.0])
    assert schedule(0.375) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="no length"):
        RootWarmUp(length=0.0)


def test_images_normalised_each_by_itself():
    raw = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    raw[0] = 7
    images = Images(raw, torch.zeros(5).long(), classes=1, mean=(9.0,) * 3, std=(9.0,) * 3, each=True)
    found, _ = images.batch(torch.arange(5))
    assert_close(found.mean((1, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
    assert_close(found[1:].square().mean((1, 2, 3)), torch.ones(4))
    assert torch.equal(found[0], torch.zeros(3, 4, 4))


def test_running_means_of_weights():
    model = nn.Linear(2, 2)
    values = [torch.randn(6) for _ in range(30)]
    average, expected = Average(model, 0.7), nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    for n, value in enumerate(values, 1):
        nn.utils.vector_to_parameters(value, model.parameters())
        average.add(n)
        c = min(0.7, (1 + n) / (10 + n))
        expected = c * expected + (1 - c) * value
    with average.in_place():
        assert_close(nn.utils.parameters_to_vector(model.parameters()), expected)
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), values[-1])


MLP = Recipe(Digits(), Mlp((16,)), Nlcg(lr=0.3), batch=102, steps=6, seed=3)


@pytest.fixture
def shared_start(monkeypatch):
    built = loop.build_model(MLP)
    monkeypatch.setattr(loop, "build_model", lambda _: copy.deepcopy(built))  # threads share one random generator


def test_a_job_is_judged_by_its_means_and_trains_on(splits):
    scores = []
    for average in (None, 0.9):
        job = prepare(replace(MLP, average=average), World(), splits)
        losses = [step.loss for step in steps(job)]
        scores.append((losses, job.score().loss))
    assert scores[0][0] == scores[1][0]
    assert scores[0][1] != scores[1][1]
    with pytest.raises(ValueError, match=r"average=1 .*--average"):
        replace(MLP, average=1.0).check_values()


STRONG = Nlcg(
    lr=1.0, preconditioner="kronecker", beta="polak_ribiere", step="curvature", feedback="step", rows_per_dim=None
)


@pytest.mark.parametrize(
    "optimizer", [Nlcg(lr=0.3, feedback="online", weight_decay=0.01), STRONG], ids=["loss", "line"]
)
@pytest.mark.parametrize(("ranks", "most"), [(1, 30), (2, 17), (2, None)])
def test_the_loop_hands_over_the_loss_and_another_forward_pass(splits, shared_start, optimizer, ranks, most):
    """In parts and over ranks it is the step of the whole batch, whose loss falls."""
    recipe = replace(MLP, optimizer=optimizer)

    def trained(world, recipe):
        job = prepare(recipe, world, splits)
        losses = [step.loss for step in steps(job)]
        return losses, job.optimizer.memory

    losses, memory = trained(World(), recipe)
    assert losses[-1] < 0.8 * losses[0]
    assert memory.told == (0 if optimizer.step == "curvature" else 6)
    for others, theirs in run_threads(ranks, lambda world: trained(world, replace(recipe, micro_batch=most))):
        assert others == pytest.approx(losses, rel=1e-3)
        assert theirs.average == pytest.approx(memory.average, rel=1e-3)


OTHER = {
    "lr": 0.3, "weight_decay": 0.1, "decay_norms": False, "preconditioner": "identity", "beta": "dai_yuan",
    "beta_max": 0.5, "step": "curvature", "feedback": None, "period": 3, "tau": 2.0, "mu": 0.1, "change": 0.25,
    "mode": "faithful",
    "prescale": 0.01, "damping": 0.1, "refresh": 4, "refresh_share": 0.2, "ema_decay": 0.5, "rows_per_dim": None,
    "fisher": "sampled",
    "inverse": "eigen", "norms": "plain", "max_size": 4, "sampling_seed": 3, "max_norm": 2.0, "wire": "float16",
    "weights_wire": "bfloat16", "overlap": True, "per_host": 2,
}  # fmt: skip
KRONECKER = (
    "damping",
    "refresh",
    "refresh_share",
    "ema_decay",
    "rows_per_dim",
    "fisher",
    "inverse",
    "norms",
    "max_size",
    "sampling_seed",
    "wire",
)
NEEDS = {
    **{key: {"preconditioner": "kronecker"} for key in KRONECKER},
    "mu": {"step": "curvature"},
    "change": {"step": "curvature"},
}


def handed_over(settings, monkeypatch):
    calls = []
    monkeypatch.setattr(Nlcg, "makes", staticmethod(lambda model, lr, **given: calls.append({"lr": lr, **given})))
    settings.build(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), World())
    found = calls[0]
    world = found["world"]
    decays = [(len(g["params"]), g.get("weight_decay")) for g in found["params"]]
    return {**found, "world": (world.wire, world.weights, world.overlap, world.per_host), "params": decays}


def test_every_field_is_passed_on(monkeypatch):
    for entry in fields(Nlcg):
        base = replace(Nlcg(), **NEEDS.get(entry.name, {}))
        changed = handed_over(replace(base, **{entry.name: OTHER[entry.name]}), monkeypatch)
        assert changed != handed_over(base, monkeypatch), entry.name


def test_every_name_of_a_choice_is_known():
    model, hints = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), get_type_hints(Nlcg)
    assert set(get_args(hints["beta"])) == set(BETAS)
    for name in ("beta", "preconditioner", "norms", "inverse", "mode", "feedback"):
        base = replace(Nlcg(), **NEEDS.get(name, {}))
        for value in {v for part in get_args(hints[name]) for v in get_args(part) or (part,)} - {type(None)}:
            assert isinstance(replace(base, **{name: value}).build(model, World()), natgrad.NLCG)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (Nlcg(damping=0.1), "damping=0.1 .*preconditioner=bfgs"),
        (Nlcg(wire="float16"), "wire=float16"),
        (Nlcg(refresh_share=0.1), "refresh_share=0.1 .*preconditioner=bfgs"),
        (Nlcg(mu=0.1), "mu=0.1 .*step=scheduled"),
        (Nlcg(change=None), "change=None .*step=scheduled"),
        (Nlcg(step="curvature", period=3, lr=1.0), "period=3 .*step=curvature"),
        (Nlcg(step="curvature", lr=1.5), "lr="),
        (Nlcg(mode="faithful", beta="hs_dy"), "faithful"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings, says):
    with pytest.raises(ValueError, match=says) as refused:
        settings.build(nn.Linear(2, 2), World())
    assert "\n" not in str(refused.value)
