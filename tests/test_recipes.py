"""Recipes: all are found, describe themselves, and build what they name."""

import json
import pkgutil
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from natgrad.parallel import World
from natgrad_lab import recipes
from natgrad_lab.__main__ import main
from natgrad_lab.recipes import every, find, in_module
from natgrad_lab.train.loop import build_model
from natgrad_lab.train.recipe import Recipe, described
from pictures import write_images

NAMES = sorted(every())
# test_recipes_imagenet.py and test_recipes_seng.py have the others
SMALL = [name for name in NAMES if not name.startswith("imagenet_") and "vgg16" not in name]


def test_the_recipes_are_these():
    kinds = ("sgd", "spngd", "kfac", "seng", "nlcg")
    sizes = ("4k", "8k", "16k", "32k", "64k", "128k")
    imagenet = {f"imagenet_{family}_{size}" for family in ("spngd", "spngd_d", "kfac") for size in sizes}
    imagenet |= {"imagenet_nlcg_64k", "imagenet_seng", "imagenet_sgd_8k"}
    sizes = ("128", "256", "512", "1k", "2k", "4k", "8k", "16k")
    nlcg = {f"cifar100_{kind}_{size}" for kind in ("nlcg", "rmsprop", "momentum", "sgd") for size in sizes}
    places = ("digits", "cifar10_resnet20", "cifar100_resnet20", "cifar100_resnet32_16k", "imagefolder64")
    beside = {f"{place}_{kind}" for place in places for kind in kinds} | {"cifar100_resnet20"}
    seng = {f"cifar10_seng_{net}{year}" for net in ("resnet18", "vgg16") for year in ("", "_2021")}
    assert imagenet | nlcg | beside | seng == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_states_its_command_its_cost_and_its_result(name):
    text = find(name).__doc__ or ""
    assert f"Command: natgrad train {name}" in text
    assert "Cost: " in text
    assert "Result: " in text


@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_builds_the_network_and_optimizer_that_it_names(name, tmp_path):
    recipe = find(name)()
    if name.startswith("imagefolder64"):
        write_images(tmp_path, classes=("cat", "cow", "dog"), count=2)
        recipe = replace(recipe, data=replace(recipe.data, path=str(tmp_path)))
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
        "from natgrad_lab.recipes.digits import digits_sgd\nfrom natgrad_lab.train.recipe import Recipe\n"
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


def test_every_module_of_recipes_is_named():
    found = [entry.name for entry in pkgutil.iter_modules(recipes.__path__) if not entry.name.startswith("_")]
    assert sorted(found) == list(recipes.MODULES)


def test_recipes_of_a_table_are_functions():
    from natgrad_lab.recipes import cifar100, cifar100_nlcg

    recipe = cifar100.RECIPES["cifar100_resnet20_seng"]
    assert recipe is find("cifar100_resnet20_seng")
    assert (recipe.__name__, recipe.__module__) == ("cifar100_resnet20_seng", "natgrad_lab.recipes.cifar100")
    assert cifar100_nlcg.RECIPES["cifar100_nlcg_16k"]().batch == 16_384


BESIDE = {
    # depth, batch, epochs, SGD's learning rate
    "cifar10_resnet20": (20, 1024, 30, 0.4),
    "cifar100_resnet20": (20, 1024, 30, 0.4),
    "cifar100_resnet32_16k": (32, 16_384, 200, 3.2),
    "imagefolder64": (18, 256, 20, 0.1),
}


@pytest.mark.parametrize("place", BESIDE)
def test_contenders_differ_in_their_optimizer_alone(place):
    depth, batch, epochs, rate = BESIDE[place]
    recipes = {kind: find(f"{place}_{kind}")() for kind in ("sgd", "spngd", "kfac", "seng", "nlcg")}
    sgd = recipes["sgd"]
    assert (sgd.model.depth, sgd.batch, sgd.epochs, sgd.steps, sgd.optimizer.lr) == (depth, batch, epochs, None, rate)
    for recipe in recipes.values():
        assert replace(recipe, optimizer=sgd.optimizer) == sgd
        assert recipe.optimizer.weight_decay == 5e-4
    assert len({type(recipe.optimizer) for recipe in recipes.values()}) == 5
    if place == "cifar100_resnet20":
        assert find(place)() == recipes["spngd"]
    if place == "imagefolder64":
        assert (sgd.model.width, sgd.data.crop) == (32, 64)


def test_the_list_has_families_with_headings_in_the_order_of_their_batches(capsys):
    assert main(["train", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    families = "\n".join(lines).split("\n\n")
    assert len(families) == 13
    own = next(family for family in families if "cifar100_nlcg_128 " in family).splitlines()
    names = [line.split()[0] for line in own if line.startswith("  cifar100_nlcg")]
    assert [name.rpartition("_")[2] for name in names] == ["128", "256", "512", "1k", "2k", "4k", "8k", "16k"]
    assert own[0].startswith("NLCG's own runs")


def test_the_baseline_of_imagenet_is_goyals():
    recipe = find("imagenet_sgd_8k")()
    assert (recipe.batch, recipe.epochs, recipe.steps) == (8192, 90, 14_076)
    rates = [3.2 * recipe.schedule(epoch / 90) for epoch in (0, 2.5, 5, 29.9, 30.1, 60.1, 80.1)]
    assert rates == pytest.approx([0.1, 1.65, 3.2, 3.2, 0.32, 0.032, 0.0032], rel=1e-6)
