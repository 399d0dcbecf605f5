"""Optimizers as settings: every field reaches the optimizer, and what cannot go together is refused."""

from dataclasses import fields, replace
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

import natgrad
from natgrad.parallel import World
from natgrad.refresh import Adaptive, Budget
from natgrad_lab.train.optimizers import KFac, SpNgd
from natgrad_lab.train.optimizers.composed import COEFFICIENTS, DTYPES, INVERSES, LENGTHS, NORMS

OTHER = {
    "lr": 0.3,
    "momentum": 0.5,
    "damping": 0.2,
    "weight_decay": 0.1,
    "fisher": "sampled",
    "refresh": 7,
    "tolerance": 0.5,
    "widen_below": 1,
    "limit": 9,
    "refresh_share": 0.2,
    "ema_decay": 0.3,
    "rows_per_dim": None,
    "max_size": 4,
    "length": "trust",
    "largest_change": 0.5,
    "coefficient": "tied",
    "before": True,
    "displaced": True,
    "decoupled": True,
    "inverse": "eigen",
    "norms": "full",
    "norm_damping": 16.0,
    "weights_wire": "bfloat16",
    "overlap": True,
    "graph": True,
    "per_host": 2,
    "rescale": "shrink",
    "max_norm": 2.0,
    "strict": True,
    "wire": "float16",
    "sampling_seed": 3,
    "gather": "directions",
}
ADAPTIVE = {key: {"refresh": None} for key in ("tolerance", "widen_below", "limit")}
BOUNDED = {"largest_change": {"length": "kl_clip"}}
NEEDS = {**ADAPTIVE, **BOUNDED, "norm_damping": {"norms": "unitwise"}}


def handed_over(settings, monkeypatch):
    """What the optimizer's constructor is called with; worlds and blocks by what they come to."""
    calls = []
    monkeypatch.setattr(
        type(settings), "makes", staticmethod(lambda model, lr, **given: calls.append({"lr": lr, **given}))
    )
    settings.build(nn.Linear(2, 2), World())
    world, chosen = calls[0]["world"], calls[0]["curvature"]
    return {
        **calls[0],
        "world": (world.wire, world.weights, world.overlap, world.per_host),
        "curvature": (chosen.matrix, chosen.norm(None)),
    }


@pytest.mark.parametrize("kind", [SpNgd, KFac])
def test_every_field_is_passed_on(kind, monkeypatch):
    for entry in fields(kind):
        base = replace(kind(), **NEEDS.get(entry.name, {}))
        changed = handed_over(replace(base, **{entry.name: OTHER[entry.name]}), monkeypatch)
        assert handed_over(base, monkeypatch) == handed_over(replace(base), monkeypatch)
        assert changed != handed_over(base, monkeypatch), entry.name


@pytest.mark.parametrize("kind", [SpNgd, KFac])
def test_every_name_of_a_choice_is_known(kind):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    choices = {
        "coefficient": COEFFICIENTS,
        "length": LENGTHS,
        "inverse": INVERSES,
        "wire": DTYPES,
        "weights_wire": DTYPES,
        "norms": NORMS,
    }
    hints = get_type_hints(kind)
    for name, known in choices.items():
        offered = {value for part in get_args(hints[name]) for value in get_args(part) or (part,)} - {type(None)}
        assert offered == set(known) - {None}
        for value in known:
            assert isinstance(replace(kind(), **{name: value}).build(model, World()), natgrad.optim.SecondOrder)


def test_names_become_what_they_say(monkeypatch):
    settings = SpNgd(
        tolerance=0.2,
        widen_below=7,
        limit=5,
        norms="plain",
        length="kl_clip",
        largest_change=0.5,
        wire="bfloat16",
    )
    given = handed_over(settings, monkeypatch)
    assert given["refresh"] == Adaptive(0.2, 7, 5)
    assert given["curvature"] == (natgrad.curvature.Kronecker, natgrad.curvature.Identity())
    assert given["length"] == natgrad.KLClip(0.5)
    assert given["world"] == (torch.bfloat16, None, False, None)
    assert handed_over(KFac(), monkeypatch)["refresh"] == Adaptive()
    assert handed_over(KFac(refresh=10), monkeypatch)["refresh"] == 10
    assert handed_over(KFac(refresh=10, refresh_share=0.1), monkeypatch)["refresh"] == Budget(0.1, 10)
    assert handed_over(SpNgd(limit=5, refresh_share=0.1), monkeypatch)["refresh"] == Budget(0.1, Adaptive(limit=5))
    assert SpNgd(length="kl_clip").how_far() == natgrad.KLClip()
    assert SpNgd().how_far() == natgrad.MeasuredChange()
    assert SpNgd(largest_change=0.5).how_far() == natgrad.MeasuredChange(0.5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (SpNgd(refresh=3, tolerance=0.2), "tolerance=0.2 .*refresh=3"),
        (SpNgd(refresh=3, widen_below=1), "widen_below=1 .*refresh=3"),
        (KFac(limit=4, refresh=10), "limit=4 .*refresh=10.*--optimizer.refresh None"),
        (SpNgd(length="plain", largest_change=0.1), "largest_change=0.1 .*length=plain"),
        (SpNgd(wire="int8"), "wire='int8' is unknown; set --optimizer.wire to one of None, float16"),
        (SpNgd(limit=0), "limit=0"),
        (SpNgd(refresh_share=0.0), "share=0"),
        (SpNgd(refresh_share=0.1, refresh=3, tolerance=0.2), "tolerance=0.2 .*refresh=3"),
        (KFac(max_norm=-1.0), "max_norm=-1"),
        (KFac(ema_decay=1.0), "ema_decay=1"),
        (SpNgd(norm_damping=0.0), "norm_damping=0 .*--optimizer.norm-damping"),
        (KFac(norm_damping=16.0), "norm_damping=16 .*norms=plain"),
        (SpNgd(before=True, displaced=True), "leave one out"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings, says):
    with pytest.raises(ValueError, match=says) as refused:
        settings.build(nn.Linear(2, 2), World())
    assert "\n" not in str(refused.value)
