"""Anybody's models, recipes and other kinds of a recipe's parts, from the command line."""

import re
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import nn

from natgrad.__main__ import main
from natgrad.models import Architecture, Mlp, UserModel
from natgrad.recipes import find, title
from natgrad.recipes.digits import digits_sgd
from natgrad.schedules import Cosine, Piecewise, WarmUp
from natgrad.train.arguments import Training, parse
from natgrad.train.kinds import kinds, swap
from natgrad.train.loop import build_model
from natgrad.train.optimizers import Seng, Settings

MINE = '''
from dataclasses import dataclass
from torch import nn
from natgrad.models import Architecture
from natgrad.train.optimizers import Sgd
from beside import widths

def make(num_classes, shape, width=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], width), nn.Linear(width, num_classes))

def other(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes), nn.Dropout(0.5), nn.BatchNorm1d(classes))

def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def wrong(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes + 1))

def images():
    return nn.Identity()

def several(classes):
    return Several()

def deep():
    return nn.Linear(3, 10)

def number():
    return 3

def broken():
    raise KeyError("my own mistake")

class Several(nn.Module):
    def forward(self, x):
        return x, x

@dataclass(frozen=True)
class Kind(Architecture):
    width: int = 7
    def build(self, shape, classes):
        return make(classes, shape, self.width)

@dataclass(frozen=True)
class Faster(Sgd):
    lr: float = 3.0

KIND = Kind(9)
built = plain()
three = 3

def recipe():
    """My recipe."""
    from natgrad.recipes.digits import digits_sgd
    return digits_sgd()

RECIPE = recipe()
'''


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "beside.py").write_text("widths = (1, 2)\n")
    (tmp_path / "lame.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE", "NATGRAD_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


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


def test_every_kind_of_the_library_is_known_by_name():
    assert {"CifarResNet", "ImageResNet", "Mlp", "PreActResNet", "Vgg16"} <= set(kinds(Architecture))
    assert {"Sgd", "AdamW", "SpNgd", "KFac", "Seng", "Nlcg"} <= set(kinds(Settings))
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


def test_the_same_seed_is_the_same_users_model():
    recipe = replace(digits_sgd(), model=UserModel("mine:make"))
    one, other = (build_model(recipe).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
