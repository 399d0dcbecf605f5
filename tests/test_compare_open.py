"""A comparison of tasks, networks and optimizers that nobody here has written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from natgrad_lab.__main__ import main
from natgrad_lab.compare.contenders import chosen
from natgrad_lab.compare.tasks import find_task
from natgrad_lab.models import UserModel
from natgrad_lab.train.optimizers import Anybodys

EXAMPLE = Path(__file__).parents[1] / "examples" / "compare_mine.py"


@pytest.fixture
def mine(tmp_path, elsewhere, monkeypatch):
    """The example in the folder where the command is given."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(EXAMPLE.read_text())
    yield "./mine.py"
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_task_a_network_and_optimizers_of_ones_own(mine):
    words = ["compare", f"{mine}:TASK", "--optimizers", "SGD", f"{mine}:SIGNS", "torch.optim:Adagrad", "natgrad:SENG"]
    assert main([*words[:-1], "--seeds", "1", "--trials", "2", "--out", "here"]) == 0
    results = json.loads(Path("here/plan.json").read_text())
    assert results["kinds"] == {"SGD": "first-order", "Signs": "first-order", "Adagrad": "first-order"}
    assert results["spaces"]["Signs"]["lr"] == "0.0001 to 0.1"
    assert results["spaces"]["Adagrad"]["lr"] == "0.001 to 0.1"  # around its own default
    assert results["task"]["recipe"]["model"]["source"].endswith("mine.py:network")


def test_workers_import_what_the_command_has_imported(mine, tmp_path):
    """In processes of their own."""
    words = [
        "compare",
        f"{mine}:TASK",
        "--optimizers",
        f"{mine}:SIGNS",
        "--seeds",
        "1",
        "--trials",
        "2",
        "--workers",
        "2",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "natgrad_lab", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "runs" / "compare-digits-mlp" / "report.html").exists()


def test_a_network_replaces_a_tasks(mine):
    task = find_task("digits").with_model(f"{mine}:network")
    assert task.recipe.model == UserModel(f"{mine}:network")
    assert find_task("digits").with_model("mlp").recipe.model != find_task("digits").recipe.model
    assert find_task("digits").with_model(None) is find_task("digits")


def test_anybodys_optimizers_are_what_their_class_says(mine):
    (signs,) = chosen((f"{mine}:Signs",))
    assert (signs.name, signs.kind, signs.base) == ("Signs", "first-order", Anybodys(0.01, f"{mine}:Signs"))
    ours, one = chosen(("SGD", "torch.optim:RMSprop"))
    assert (ours.name, one.base.lr) == ("SGD", 0.01)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compare", "mine:SIGNS"], "mine:SIGNS is no task"),
        (["compare", "nowhere:TASK"], "no module 'nowhere'"),
        (["compare", "mine:TASK", "--optimizers", "mine:network"], "mine:network is no contender"),
        (["compare", "mine:TASK", "--optimizers", "mine:SIGNS", "mine:Signs"], "two optimizers are called Signs"),
        (["compare", "digits", "--optimizers", "natgrad:KFAC"], "two optimizers are called KFAC"),
        (["compare", "digits", "--model", "mine:SIGNS"], "mine:SIGNS"),
        (["train", "digits_sgd", "--optimizer", "mine:Signs", "--optimizer.arguments", "3"], "no JSON object"),
        (["train", "digits_sgd", "--optimizer", "mine:Signs", "--optimizer.arguments", '{"x": 1}'], "'x'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(mine, arguments, says, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert re.search(says, said), said


def test_a_class_of_ones_own_trains_by_the_trainer(mine):
    words = ["--optimizer", f"{mine}:Signs", "--optimizer.lr", "0.005", "--optimizer.arguments", '{"momentum": 0.5}']
    assert main(["train", "digits_sgd", *words, "--steps", "2", "--out", "here"]) == 0
    assert json.loads(Path("here/recipe.json").read_text())["recipe"]["optimizer"] == {
        "kind": "Anybodys",
        "lr": 0.005,
        "path": f"{mine}:Signs",
        "arguments": '{"momentum": 0.5}',
    }
