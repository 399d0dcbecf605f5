"""Recipes: all are found, describe themselves, and build what they name."""

import json
import sys
from types import ModuleType

import pytest
import torch

from natgrad.parallel import World
from natgrad.recipes import every, find, in_module
from natgrad.train.loop import build_model
from natgrad.train.recipe import Recipe, described

NAMES = sorted(every())
# test_recipes_imagenet.py and test_recipes_seng.py have the others
SMALL = [name for name in NAMES if not name.startswith("imagenet_") and name != "cifar10_seng_vgg16"]


def test_the_recipes_are_these():
    sizes = ("4k", "8k", "16k", "32k", "64k", "128k")
    imagenet = {f"imagenet_{family}_{size}" for family in ("spngd", "spngd_d", "kfac") for size in sizes}
    nlcg = {f"cifar100_nlcg_{size}" for size in ("128", "256", "512", "1k", "2k", "4k", "8k", "16k")}
    others = {"cifar100_sgd", "cifar100_spngd", "cifar100_momentum_16k", "imagenet_nlcg_64k"}
    digits = {f"digits_{kind}" for kind in ("sgd", "spngd", "kfac", "nlcg", "seng")}
    seng = {"imagenet_seng", "cifar10_seng_resnet18", "cifar10_seng_vgg16"}
    assert digits | others | nlcg | imagenet | seng == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_states_its_command_its_cost_and_its_result(name):
    text = find(name).__doc__ or ""
    assert f"Command: natgrad train {name}" in text
    assert "Cost: " in text
    assert "Result: " in text


@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_builds_the_network_and_optimizer_that_it_names(name):
    recipe = find(name)()
    model = build_model(recipe)
    optimizer = recipe.optimizer.build(model, World())
    assert len([p for group in optimizer.param_groups for p in group["params"]]) == len(list(model.parameters()))
    assert model(torch.randn(2, *recipe.data.shape())).shape == (2, recipe.data.classes())
    assert json.loads(json.dumps(described(recipe)))["kind"] == "Recipe"


def test_two_builds_from_a_seed_are_alike():
    one, other = (build_model(find("digits_sgd")()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


def test_a_function_that_promises_a_recipe_is_one(monkeypatch):
    module = ModuleType("my_recipes")
    code = (
        "from natgrad.recipes.digits import digits_sgd\nfrom natgrad.train.recipe import Recipe\n"
        "def mine() -> Recipe: return digits_sgd()\ndef _hidden() -> Recipe: return digits_sgd()\n"
        "def helper() -> int: return 1\n"
    )
    exec(code, module.__dict__)
    monkeypatch.setitem(sys.modules, "my_recipes", module)
    found = in_module("my_recipes")
    assert list(found) == ["mine"]
    assert isinstance(found["mine"](), Recipe)


def test_a_misspelt_recipe_is_answered_with_its_neighbours():
    with pytest.raises(ValueError, match=r"no recipe 'digits_spgnd'; did you mean .*digits_spngd"):
        find("digits_spgnd")
    with pytest.raises(ValueError, match="natgrad train --list"):
        find("zzz")
