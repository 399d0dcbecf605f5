"""Other kinds of a recipe's parts and anybody's recipes, from the command line."""

import importlib
import pkgutil
import re
import sys
from dataclasses import replace

import pytest
from torch import nn

import natgrad_lab
from natgrad_lab.__main__ import main
from natgrad_lab.models import Mlp, UserModel
from natgrad_lab.recipes import find, title
from natgrad_lab.recipes.digits import digits_sgd
from natgrad_lab.schedules import Cosine, Piecewise, WarmUp
from natgrad_lab.train.arguments import Training, parse
from natgrad_lab.train.loop import build_model
from natgrad_lab.train.optimizers import Anybodys, Seng
from natgrad_lab.train.part_kinds import KINDS, kinds, swap
from users import _mine  # noqa: F401


def parsed(*arguments):
    return parse(Training(digits_sgd()), "natgrad train digits_sgd", "", list(arguments)).recipe


def test_a_part_is_replaced_by_another_kind_whose_fields_can_be_set():
    assert parsed("--model", "Mlp", "--model.hidden", "3", "4").model == Mlp((3, 4))
    assert parsed("--model=m-l-p").model == Mlp()
    assert parsed("--optimizer", "seng", "--optimizer.lr", "0.3").optimizer == Seng(lr=0.3)
    assert parsed("--optimizer.lr", "0.3", "--optimizer", "seng").optimizer == Seng(lr=0.3)
    assert parsed("--schedule.then", "cosine", "--schedule", "warm_up").schedule == WarmUp(Cosine())
    growing = parsed("--batch-schedule", "piecewise", "--batch-schedule.values", "1", "2", "4").batch_schedule
    assert growing == Piecewise((0.5, 0.75), (1, 2, 4))
    assert parsed() == digits_sgd()


def test_help_names_the_kinds(capsys):
    with pytest.raises(SystemExit):
        main(["train", "digits_sgd", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--optimizer AdamW | " in said
    assert "--model CifarResNet | " in said
    assert "package.module:function" in said


def test_import_paths_are_models_and_kinds():
    assert parsed("--model", "./mine.py:make", "--model.args", '{"width": 3}').model == UserModel(
        "./mine.py:make", '{"width": 3}'
    )
    own = parsed("--model", "mine:Kind", "--model.width", "5").model
    assert (type(own).__name__, own) == ("Kind", sys.modules["mine"].Kind(5))
    assert parsed("--model", "mine:KIND").model == sys.modules["mine"].Kind(9)
    assert parsed("--model", "torchvision:resnet18").model == UserModel("torchvision:resnet18")
    assert parsed("--optimizer", "mine:Faster").optimizer.lr == 3
    assert isinstance(build_model(replace(digits_sgd(), model=own)), nn.Module)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "vgg"], "--model 'vgg' is no kind of Architecture; did you mean Vgg16"),
        (["--optimizer", "zzz"], "choose .*Seng.*Sgd"),
        (["--optimizer", "mine:make"], "mine:make is no kind of Settings; choose"),
        (["--model", "nowhere:make"], "no module 'nowhere'"),
        (["--model", "mine:wrong"], r"\[2, 11\]"),
        (["--model"], "--model '' is no kind"),
        (["--model.args", "3"], "no field '--model.args'"),
        (["--regularisation", "Mixup"], "'--regularisation'"),
    ],
)
def test_kinds_that_are_not_there_are_refused_by_the_command(arguments, says, capsys, tmp_path):
    assert main(["train", "digits_sgd", *arguments]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert re.search(says, said), said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("declared", KINDS)
def test_every_kind_of_the_workbench_is_offered_and_no_base(declared):
    """Its own name is in the table, and what others derive from is not (Stdlib derives from Charlm: both are texts)."""
    package = declared.__module__.rpartition(".")[0]
    for module in pkgutil.walk_packages(natgrad_lab.__path__, "natgrad_lab."):
        if package != "natgrad_lab" and module.name.startswith(package):
            importlib.import_module(module.name)
    todo, found = [declared], {}
    while todo:
        kind = todo.pop()
        derived = [one for one in kind.__subclasses__() if one.__module__.startswith(package)]
        todo += derived
        if kind not in (UserModel, Anybodys) and (not derived or kind.__name__ == "Charlm"):
            found[kind.__name__] = kind
    assert kinds(declared) == found
    for kind in found.values():
        kind()  # the command line begins with its defaults


def test_what_names_no_part_is_left_alone():
    assert swap(Training(digits_sgd()), ["--batch", "3"])[1] == ["--batch", "3"]


def test_a_users_model_is_trained_on_two_ranks_and_recorded(capfd, tmp_path):
    command = ["train", "digits_kfac", "--model", "./mine.py:make", "--steps", "4", "--ranks", "2", "--out", "here"]
    assert main(command) == 0, capfd.readouterr().err
    assert any("./mine.py:make" in file.read_text() for file in (tmp_path / "here").glob("*.json"))


@pytest.mark.parametrize("name", ["mine:recipe", "./mine.py:recipe", "./mine.py:RECIPE"])
def test_anybodys_recipe_is_found_by_its_path(name):
    assert find(name)() == digits_sgd()
    assert title(name) == name.split(":")[1]
    assert title("digits_sgd") == "digits_sgd"


def test_a_path_that_is_no_recipe_is_refused(capsys):
    for name, says in (("mine:make", "is no recipe"), ("mine:number", "is no recipe"), ("mine:none", "no 'none'")):
        for command in ("train", "coverage"):
            assert main([command, name]) == 2
            said = capsys.readouterr().err
            assert len(said.splitlines()) == 1
            assert says in said


def test_a_recipe_of_ones_own_trains_under_its_own_name(tmp_path):
    assert main(["train", "./mine.py:recipe", "--steps", "2", "--optimizer.lr", "0.05"]) == 0
    assert (tmp_path / "runs" / "recipe" / "metrics.jsonl").exists()
