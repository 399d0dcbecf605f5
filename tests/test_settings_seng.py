"""SENG as settings: every field reaches the optimizer, and what cannot go together is refused."""

from dataclasses import fields, replace
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

import natgrad
from natgrad.optim.directions import Momentum, tied
from natgrad.parallel import World
from natgrad_lab.train.optimizers import Seng
from natgrad_lab.train.optimizers.composed import COEFFICIENTS, DTYPES, LENGTHS
from natgrad_lab.train.optimizers.seng import LEGACY, SKETCHES

OTHER = {
    "lr": 0.3,
    "momentum": 0.5,
    "damping": 0.2,
    "weight_decay": 0.1,
    "refresh": 7,
    "refresh_share": 0.2,
    "samples": None,
    "sketch": None,
    "sketch_size": 5,
    "rank": 2,
    "columns": "improved",
    "block": "network",
    "budget": 2**20,
    "legacy": True,
    "legacy_c": 2,
    "legacy_threshold": 3,
    "legacy_mean_field": True,
    "legacy_local": True,
    "length": "trust",
    "largest_change": 0.5,
    "coefficient": "tied",
    "before": True,
    "displaced": True,
    "decoupled": True,
    "rescale": "shrink",
    "max_norm": 2.0,
    "strict": True,
    "replicated": True,
    "wire": "float16",
    "weights_wire": "bfloat16",
    "overlap": True,
    "per_host": 2,
    "sampling_seed": 3,
}
NEEDS = {
    **{name: {"legacy": True, "replicated": True} for name in LEGACY},
    "largest_change": {"length": "kl_clip"},
}


def handed_over(settings, monkeypatch):
    """What the optimizer's constructor is called with; worlds by what they come to."""
    calls = []
    monkeypatch.setattr(Seng, "makes", staticmethod(lambda model, lr, **given: calls.append({"lr": lr, **given})))
    settings.build(nn.Linear(2, 2), World())
    world = calls[0]["world"]
    return {**calls[0], "world": (world.wire, world.weights, world.overlap, world.owners, world.per_host)}


def test_every_field_is_passed_on(monkeypatch):
    for entry in fields(Seng):
        base = replace(Seng(), **NEEDS.get(entry.name, {}))
        changed = handed_over(replace(base, **{entry.name: OTHER[entry.name]}), monkeypatch)
        assert handed_over(base, monkeypatch) == handed_over(replace(base), monkeypatch)
        assert changed != handed_over(base, monkeypatch), entry.name


@pytest.mark.parametrize("name", [entry.name for entry in fields(Seng)])
def test_every_field_can_train(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    settings = replace(Seng(), **{**NEEDS.get(name, {}), name: OTHER[name]})
    optimizer = settings.build(model, World())
    before = [p.detach().clone() for p in model.parameters()]
    nn.functional.cross_entropy(model(torch.randn(8, 3)), torch.arange(8) % 3).backward()
    optimizer.step()
    assert all(p.isfinite().all() and not torch.equal(p, b) for p, b in zip(model.parameters(), before))


def test_every_name_of_a_choice_is_known():
    choices = {
        "sketch": SKETCHES,
        "length": LENGTHS,
        "coefficient": COEFFICIENTS,
        "wire": DTYPES,
        "weights_wire": DTYPES,
    }
    hints = get_type_hints(Seng)
    for name, known in choices.items():
        offered = {value for part in get_args(hints[name]) for value in get_args(part) or (part,)} - {type(None)}
        assert offered == set(known) - {None}
        for value in known:
            built = replace(Seng(), **{name: value}).build(nn.Linear(2, 2), World())
            assert isinstance(built, natgrad.SENG)


def test_names_become_what_they_say(monkeypatch):
    settings = Seng(
        sketch="uniform",
        sketch_size=9,
        legacy=True,
        legacy_c=128,
        legacy_threshold=10,
        length="kl_clip",
        largest_change=0.5,
        coefficient="tied",
        replicated=True,
        wire="bfloat16",
    )
    given = handed_over(settings, monkeypatch)
    assert given["sketch"] == natgrad.curvature.Uniform(9)
    assert given["legacy"] == natgrad.curvature.Legacy(128, 10)
    assert given["length"] == natgrad.KLClip(0.5)
    assert given["rule"] == Momentum(False, tied, False, False)
    assert given["world"] == (torch.bfloat16, None, False, False, None)
    assert handed_over(Seng(), monkeypatch)["legacy"] is None


def test_defaults_are_those_of_the_optimizer(monkeypatch):
    given = handed_over(Seng(), monkeypatch)
    monkeypatch.undo()
    offered = natgrad.SENG.__init__.__kwdefaults__
    same = set(offered) - {"world", "rule"}
    assert given["rule"] == Momentum(decoupled=False)  # as the comparison was tuned
    assert {name: given[name] for name in same} == {name: offered[name] for name in same}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (Seng(sketch=None, sketch_size=4), "sketch_size=4 .*sketch=None"),
        (Seng(sketch_size=0), "size=0"),
        (Seng(legacy_c=128), "legacy_c=128 .*--optimizer.legacy"),
        (Seng(legacy_mean_field=True), "legacy_mean_field=True .*--optimizer.legacy"),
        (Seng(legacy=True, legacy_c=0), "c=0"),
        (Seng(legacy=True, legacy_local=True), "legacy_local .*--optimizer.replicated"),
        (Seng(legacy=True, legacy_local=True, replicated=True, block="network"), "legacy_local .*block layer"),
        (Seng(replicated=True, weights_wire="float16"), "weights_wire=float16.*leave one out"),
        (Seng(largest_change=0.1, length="plain"), "largest_change=0.1 .*length=plain"),
        (Seng(rank=0), "rank=0"),
        (Seng(budget=0), "budget=0"),
        (Seng(damping=0.0), "damping=0"),
        (Seng(refresh=0), "0"),
        (Seng(refresh_share=0.1, block="network"), "refresh_share=0.1 .*--optimizer.block layer"),
        (Seng(before=True, displaced=True), "leave one out"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings, says):
    with pytest.raises(ValueError, match=says) as refused:
        settings.build(nn.Linear(2, 2), World())
    assert "\n" not in str(refused.value)
