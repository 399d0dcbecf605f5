"""`natgrad plan` as users call it: tables, files, pages, and one line for every mistake."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from natgrad_lab.__main__ import main
from natgrad_lab.recipes import find
from natgrad_lab.report.plan import page
from natgrad_lab.train.arguments import Training, parse


def tiny() -> nn.Module:
    """A model for --model."""
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 4))


def reading() -> nn.Module:
    """One that looks at its numbers."""

    class Reading(nn.Linear):
        def forward(self, x):
            return super().forward(x) * float(x.sum())

    return Reading(16, 4)


def tokens() -> nn.Module:
    """One of whole numbers."""
    return nn.Sequential(nn.Embedding(11, 8), nn.Flatten(), nn.Linear(40, 4))


def nothing() -> int:
    """No model."""
    return 3


HERE = f"{__name__}"
MISTAKES = {
    "nothing": (["plan"], "--list"),
    "a recipe": (["plan", "digits_spgnd"], "did you mean digits_spngd"),
    "a field": (["plan", "digits_spngd", "--machin", "h100"], "did you mean --machine"),
    "a machine": (["plan", "digits_spngd", "--machine", "h10"], "'h10'; did you mean h100"),
    "another machine": (["plan", "digits_spngd", "--machine", "abacus"], "'abacus'; choose v100-ib, a100"),
    "a file": (["plan", "digits_spngd", "--machine", "no/such.json"], "'no/such.json'"),
    "ranks": (["plan", "digits_spngd", "--ranks", "1,two"], "--ranks '1,two'"),
    "no ranks": (["plan", "digits_spngd", "--ranks", "0"], "--ranks '0'"),
    "a batch": (["plan", "digits_spngd", "--ranks", "1,2"], "batch=479 is not divisible by 2 ranks.*--batch"),
    "an optimizer": (["plan", "digits_spngd", "--ranks", "1", "--optimizers", "SGDD"], "'SGDD'.*SP-NGD"),
    "a share": (["plan", "digits_spngd", "--ranks", "1", "--overhead", "much"], "'much'.*--overhead 5%"),
    "no curvature": (["plan", "digits_sgd", "--ranks", "1", "--overhead", "5%"], "Sgd measures no curvature"),
    "measured share": (["plan", "digits_spngd", "--ranks", "1", "--share", "2"], "share=2"),
    "a value": (["plan", "digits_spngd", "--ranks", "1", "--optimizer.damping", "0"], "damping"),
    "a folder": (["plan", "digits_spngd", "--ranks", "1", "--json", "no/p.json"], "--json 'no/p.json'"),
    "a page": (["plan", "digits_spngd", "--ranks", "1", "--out", "no/p.html"], "--out 'no/p.html'"),
    "no model": (["plan", "--input", "3,4,4"], "--model package.module:function"),
    "a module": (["plan", "--model", "no.such:fn"], "there is no module 'no'"),
    "a function": (["plan", "--model", f"{HERE}:none"], "there is no 'none'"),
    "not callable": (["plan", "--model", f"{HERE}:HERE"], "name a function or class"),
    "another kind": (["plan", "--model", f"{HERE}:nothing", "--ranks", "1"], "gave a int, not a torch.nn.Module"),
    "a shape": (["plan", "--model", f"{HERE}:tiny", "--input", "3,x"], "--input '3,x'"),
    "another shape": (
        ["plan", "--model", f"{HERE}:tiny", "--input", "3,5,5", "--ranks", "1"],
        "cannot be traced.*3x5x5",
    ),
    "numbers read": (
        ["plan", "--model", f"{HERE}:reading", "--input", "16", "--ranks", "1"],
        "cannot be traced on meta",
    ),
    "calibrating": (["plan", "--calibrate", "no/m.json"], "'no/m.json'"),
    "calibrating what": (["plan", "--calibrate", "m.json", "--machine", "cpu"], "'--machine'"),
}


pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_in_one_line_and_writes_nothing(name, capsys, tmp_path):
    arguments, says = MISTAKES[name]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1
    assert re.search(says, said.err), said.err
    assert list(tmp_path.iterdir()) == []


BROKEN = {
    "no JSON": ("{", "no readable JSON"),
    "a list": ("[]", "lacks name, device"),
    "fields missing": ('{"name": "x"}', "lacks device, rates"),
    "no rates": (None, "rates"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_machine_is_said_to_be_so(name, capsys):
    text, says = BROKEN[name]
    if text is None:
        from natgrad_lab.plan.machines import named

        text = json.dumps({**named("cpu").described(), "rates": {"conv": [[1, 0]]}})
    Path("m.json").write_text(text)
    assert main(["plan", "digits_spngd", "--ranks", "1", "--machine", "m.json"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert says in said


def test_a_plan_in_the_terminal_as_json_and_as_a_page(capsys):
    arguments = ["--ranks", "1,4,16", "--per-rank", "32", "--machine", "a100", "--overhead", "400%"]
    assert main(["plan", "digits_spngd", *arguments, "--json", "p.json", "--out", "p.html"]) == 0
    said = capsys.readouterr().out
    for word in ("SP-NGD", "K-FAC", "SENG", "NLCG", "factor", "gather", "blocks.2.conv2", "--optimizer.refresh"):
        assert word in said
    plan = json.loads(Path("p.json").read_text())
    rows = plan["optimizers"][0]["rows"]
    assert [row["ranks"] for row in rows] == [1, 4, 16]
    assert [row["batch"] for row in rows] == [32, 128, 512]
    assert rows[0]["run"]["steps"] == -(-8 * 1437 // 32)
    assert rows[0]["run"]["seconds"] == pytest.approx(rows[0]["run"]["steps"] * rows[0]["step"]["average"])
    assert rows[2]["bytes"]["fresh"]["statistics"] > 0
    for row in rows:
        assert sum(row["stages"]["average"].values()) == pytest.approx(row["step"]["average"])
        assert row["step"]["stale"] < row["step"]["average"] < row["step"]["fresh"]
    html = Path("p.html").read_text()
    assert html.count("<img") == 2 + 3 + 2  # steps, stages, costs
    assert "Where the machine" in html
    assert "<script" not in html
    assert page(plan) == html


def test_the_advice_is_taken_by_natgrad_train(capsys):
    assert main(["plan", "digits_kfac", "--ranks", "1", "--machine", "cpu", "--overhead", "30%"]) == 0
    [line] = [one for one in capsys.readouterr().out.splitlines() if one.strip().startswith("natgrad train")]
    _, _, name, *rest = shlex.split(line)
    values = parse(Training(find(name)()), "natgrad train", "", rest)
    assert values.recipe.optimizer.refresh == int(rest[rest.index("--optimizer.refresh") + 1])
    values.recipe.check_values()
    values.recipe.optimizer.build(tiny(), __import__("natgrad").World())


def test_a_recipe_without_its_data_is_planned(capsys):
    arguments = ["--ranks", "1024", "--machine", "v100-ib", "--optimizers", "SGD"]
    assert main(["plan", "imagenet_spngd_32k", *arguments]) == 0
    said = capsys.readouterr().out
    assert "25,557,032 parameters" in said
    assert "min" in said


@pytest.mark.parametrize(
    ("target", "options"), [("tiny", ["--input", "3,4,4"]), ("tokens", ["--input", "5", "--tokens", "11"])]
)
def test_any_model_is_planned(target, options, capsys):
    arguments = ["--model", f"{HERE}:{target}", *options, "--ranks", "1,8", "--batch", "64", "--optimizer.refresh", "5"]
    assert main(["plan", *arguments, "--machine", "h200", "--json", "p.json"]) == 0
    plan = json.loads(Path("p.json").read_text())
    assert plan["optimizers"][0]["rows"][0]["share"] == pytest.approx(0.2)
    assert plan["optimizers"][0]["rows"][0]["run"] is None
    assert plan["parameters"] == sum(p.numel() for p in globals()[target]().parameters())


def test_help_names_machines_and_recipes(capsys):
    with pytest.raises(SystemExit) as left:
        main(["plan", "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert "v100-ib" in said
    assert "digits_spngd" in said


@pytest.mark.slow
def test_one_rank_calibrates_and_the_file_serves(capsys, monkeypatch):
    from natgrad_lab.plan import bench

    monkeypatch.setattr(bench, "BUDGET", 0.0)
    assert main(["plan", "--calibrate", "m.json", "--ranks", "1"]) == 0
    assert main(["plan", "digits_sgd", "--ranks", "1", "--machine", "m.json", "--optimizers", "SGD"]) == 0
    assert "measured by natgrad plan --calibrate" in capsys.readouterr().out
    assert torch.get_num_threads() == 1
