"""Wrong use fails at once, in one line that shows the value and names the way out."""

import copy
import math
import pickle
import re

import pytest
import torch
from torch import nn

import natgrad
from helpers import Mixed, mlp, points, train
from natgrad.optim import KLClip, MeasuredChange

NAN, INF = float("nan"), float("inf")

VALUES = [
    ("lr", 0, "above 0"),
    ("lr", -1.0, "above 0"),
    ("lr", NAN, "above 0"),
    ("lr", INF, "above 0"),
    ("lr", "fast", "above 0"),
    ("lr", None, "above 0"),
    ("damping", 0.0, "above 0"),
    ("damping", -1e-3, "above 0"),
    ("damping", NAN, "above 0"),
    ("momentum", 1, "below 1"),
    ("momentum", -0.1, "at least 0"),
    ("momentum", NAN, "at least 0"),
    ("weight_decay", -1e-4, "at least 0"),
    ("weight_decay", INF, "at least 0"),
    ("rows_per_dim", 0, "or None"),
    ("rows_per_dim", 1.5, "whole number"),
    ("rows_per_dim", True, "whole number"),
    ("max_size", 0, "whole number"),
    ("max_norm", 0, "above 0"),
    ("max_norm", NAN, "above 0"),
    ("ema_decay", 1, "below 1"),
    ("ema_decay", -0.5, "at least 0"),
    ("refresh", 0, "1 or more"),
    ("refresh", -3, "1 or more"),
    ("refresh", 2.5, "whole number"),
    ("refresh", "often", "whole number"),
    ("reduction", "none", "'mean', 'sum'"),
    ("rescale", "grow", "'always', 'shrink'"),
    ("gather", "all", "'weights', 'directions'"),
    ("fisher", "true", "'empirical', 'sampled'"),
]


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 400
    for part in parts:
        assert part in message


@pytest.mark.parametrize(("name", "value", "way"), VALUES, ids=[f"{n}={v}" for n, v, _ in VALUES])
def test_values(name, value, way):
    options = {"lr": 0.1, name: value}
    with pytest.raises(ValueError, match=re.escape(name)) as error:
        natgrad.KFAC(mlp(), **options)
    one_line(error, str(value), way)


@pytest.mark.parametrize(("name", "value"), [("lr", NAN), ("momentum", 1.0), ("damping", 0.0), ("refresh", 0)])
def test_values_of_groups_at_the_start_and_later(name, value):
    model = mlp()
    groups = [{"params": model[0].parameters(), name: value}, {"params": model[2].parameters()}]
    with pytest.raises(ValueError, match=f"{name}="):
        natgrad.SPNGD(model, lr=0.1, params=groups)
    opt = natgrad.SPNGD(model, lr=0.1)
    train(opt, model, [points(8, 0)])
    opt.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"{name}=") as error:
        train(opt, model, [points(8, 0)])
    one_line(error, str(value))


def test_numbers_of_numpy_and_tensors_are_numbers():
    import numpy as np

    natgrad.SPNGD(mlp(), lr=np.float64(0.1), damping=np.float64(1e-2))
    natgrad.SPNGD(mlp(), lr=0.1, rows_per_dim=int(np.int64(4)))


@pytest.mark.parametrize("build", [natgrad.SPNGD, natgrad.KFAC])
@pytest.mark.parametrize(
    "wrong", [lambda: mlp().parameters(), lambda: list(mlp().parameters()), lambda: None, lambda: [{"params": []}]]
)
def test_parameters_instead_of_the_model(wrong, build):
    with pytest.raises(ValueError, match="pass the model itself") as error:
        build(wrong(), lr=0.1)
    one_line(error, "params=")


@pytest.mark.parametrize("build", [nn.Tanh, lambda: mlp().requires_grad_(False)])
def test_nothing_to_train(build):
    with pytest.raises(ValueError, match="no trainable parameters") as error:
        natgrad.SPNGD(build(), lr=0.1)
    one_line(error, "requires_grad=True")


@pytest.mark.parametrize("lazy", [lambda: nn.LazyLinear(3), lambda: nn.LazyConv2d(3, 3), lambda: nn.LazyBatchNorm1d()])
def test_lazy_modules(lazy):
    with pytest.raises(ValueError, match="run the model once") as error:
        natgrad.SPNGD(nn.Sequential(nn.Linear(4, 4), lazy()), lr=0.1)
    one_line(error, "1.weight")


def test_parameters_of_another_model():
    with pytest.raises(ValueError, match="not the model's") as error:
        natgrad.SPNGD(mlp(), lr=0.1, params=mlp().parameters())
    one_line(error, "params=")
    with pytest.raises(ValueError, match="not the model's"):
        natgrad.SPNGD(mlp(), lr=0.1, params=[{"params": mlp()[0].weight}])


def test_a_parameter_in_two_groups():
    model = mlp()
    with pytest.raises(ValueError, match="more than one parameter group"):
        natgrad.SPNGD(model, lr=0.1, params=[{"params": model.parameters()}, {"params": model[0].weight}])


def test_strict_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="strict=True") as error:
        natgrad.SPNGD(Mixed(), lr=0.1, strict=True)
    one_line(error, "gain", "no layer is registered for Mixed", "leave strict off")
    natgrad.SPNGD(mlp(), lr=0.1, strict=True)


def test_groups_cannot_be_added_later():
    model = mlp()
    opt = natgrad.SPNGD(model, lr=0.1)
    with pytest.raises(ValueError, match="params=") as error:
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    one_line(error)


@pytest.mark.parametrize("attempt", [copy.deepcopy, copy.copy, pickle.dumps], ids=["deepcopy", "copy", "pickle"])
def test_an_optimizer_is_not_copied(attempt):
    opt = natgrad.SPNGD(mlp(), lr=0.1)
    with pytest.raises(TypeError, match=r"state_dict\(\)") as error:
        attempt(opt)
    one_line(error, "build it again")


def test_schedules_may_take_lr_to_zero_later():
    model = mlp()
    opt = natgrad.SPNGD(model, lr=0.1)
    opt.param_groups[0]["lr"] = 0.0
    train(opt, model, [points(8, 0)])


@pytest.mark.parametrize("value", [0, -1.0, NAN])
def test_lengths_and_staleness(value):
    with pytest.raises(ValueError, match=f"limit={value}"):
        KLClip(value)
    for name in ("limit", "first", "least", "most"):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            MeasuredChange(**{name: value})
    if value != 0:
        with pytest.raises(ValueError, match=f"memory={value}"):
            MeasuredChange(memory=value)
    with pytest.raises(ValueError, match=f"tolerance={value}"):
        natgrad.Adaptive(tolerance=value)
    if not math.isnan(value):
        with pytest.raises(ValueError, match=f"limit={value}"):
            natgrad.Adaptive(limit=value)
        with pytest.raises(ValueError, match=f"refresh={value}"):
            natgrad.Every(value)


def test_a_step_without_gradients_does_nothing():
    model = mlp()
    opt = natgrad.SPNGD(model, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    opt.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    train(opt, model, [points(8, 0)] * 2)  # the first of them notices that layers are in use, and measures them next
    assert not torch.equal(model[0].weight, before[0])
