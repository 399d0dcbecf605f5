"""Anybody's models: how they are made and checked."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import nn

from natgrad_lab.models import UserModel
from natgrad_lab.recipes.digits import digits_sgd
from natgrad_lab.train.loop import build_model
from users import _mine  # noqa: F401


def shapes(model):
    return [tuple(p.shape) for p in model.parameters() if p.dim() == 2]


@pytest.mark.parametrize("place", ["./mine.py", "mine.py", "mine"])
def test_a_function_is_called_with_what_it_has_names_for(place):
    assert shapes(UserModel(f"{place}:make").build((1, 8, 8), 10)) == [(4, 64), (10, 4)]
    assert shapes(UserModel(f"{place}:make", '{"width": 3}').build((1, 8, 8), 10)) == [(3, 64), (10, 3)]
    assert shapes(UserModel(f"{place}:other").build((1, 8, 8), 10)) == [(10, 64)]
    assert shapes(UserModel(f"{place}:plain").build((1, 8, 8), 10)) == [(10, 64)]


def test_the_look_at_the_output_leaves_no_trace():
    model = UserModel("mine:other").build((1, 8, 8), 10)
    assert all(module.training for module in model.modules())
    norm = model.get_submodule("3")
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("source", "args", "says"),
    [
        ("mine:none", "{}", "'mine:none': there is no 'none' in mine"),
        ("nowhere.at.all:make", "{}", "no module 'nowhere'"),
        ("./nowhere.py:make", "{}", "no file './nowhere.py'"),
        (":make", "{}", "':make' names nothing"),
        ("mine:", "{}", "'mine:' names nothing"),
        (".mine:make", "{}", "'.mine' is no name of a module"),
        ("mine:number", "{}", "mine:number gave a int, not a torch.nn.Module"),
        ("mine:three", "{}", "mine:three is a int"),
        ("mine:built", "{}", "mine:built is a module that is built already"),
        ("mine:wrong", "{}", r"\[2, 11\] for two inputs, not \[2, 10\]"),
        ("mine:images", "{}", r"\[2, 1, 8, 8\] for two inputs"),
        ("mine:several", "{}", "gave a tuple, not a tensor"),
        ("mine:deep", "{}", r"cannot take inputs \[2, 1, 8, 8\]"),
        ("mine:make", "width=3", "'width=3' is no JSON"),
        ("mine:make", "[3]", "must be names and values"),
        ("mine:make", '{"wide": 3}', "unexpected keyword argument 'wide'"),
        ("timm:resnet18", "{}", "timm is not installed; pip install timm"),
        ("torchvision:resnet18", "{}", "torchvision cannot be imported"),
    ],
)
def test_what_cannot_be_a_model_is_refused_in_one_line(source, args, says, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
        monkeypatch.delitem(sys.modules, name)
    if source.startswith("timm"):
        says = "timm (is not installed|cannot be imported)"
    if source.startswith("torchvision"):
        says = "torchvision (is not installed|cannot be imported)"
    with pytest.raises(ValueError, match=says) as refused:
        UserModel(source, args).build((1, 8, 8), 10)
    assert "\n" not in str(refused.value)


def test_a_users_own_mistake_is_shown_as_it_is():
    with pytest.raises(KeyError, match="my own mistake"):
        UserModel("mine:broken").build((1, 8, 8), 10)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        UserModel("./lame.py:make").build((1, 8, 8), 10)


def test_torchvision_and_timm_are_called_by_their_own_functions(monkeypatch):
    told = []

    def get_model(name, **values):
        told.append((name, values))
        return nn.Sequential(nn.Flatten(), nn.Linear(64, values["num_classes"]))

    def create_model(name, **values):
        return get_model(name, **values)

    models, timm = ModuleType("torchvision.models"), ModuleType("timm")
    vars(models).update(get_model=get_model, list_models=lambda: ["resnet18"])
    vars(timm).update(create_model=create_model, is_model=lambda name: name == "resnet18")
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setitem(sys.modules, "timm", timm)
    UserModel("torchvision:resnet18").build((1, 8, 8), 10)
    UserModel("timm:resnet18", '{"drop_rate": 0.1}').build((1, 8, 8), 10)
    assert told == [
        ("resnet18", {"num_classes": 10}),
        ("resnet18", {"num_classes": 10, "in_chans": 1, "drop_rate": 0.1}),
    ]
    for library in ("torchvision", "timm"):
        with pytest.raises(ValueError, match=f"{library} has no model 'resnet19'"):
            UserModel(f"{library}:resnet19").build((1, 8, 8), 10)


def test_the_real_torchvision_is_called_too():
    try:
        import torchvision.models  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no torchvision: {error}")
    model = UserModel("torchvision:resnet18").build((3, 32, 32), 100)
    assert sum(p.numel() for p in model.parameters()) == 11_689_512 - 900 * 513


def test_the_same_seed_is_the_same_users_model():
    recipe = replace(digits_sgd(), model=UserModel("mine:make"))
    one, other = (build_model(recipe).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
