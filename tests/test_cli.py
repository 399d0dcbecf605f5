"""The command line: one line and exit code 2 for every mistake, and the real thing on two processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from natgrad_lab.__main__ import main

MISTAKES = {
    "a command": (["trian"], "no command 'trian'; choose train"),
    "no recipe": (["train"], "--list"),
    "a recipe": (["train", "digits_spgnd"], "did you mean digits_spngd"),
    "a field": (["train", "digits_sgd", "--optimizr.lr", "1"], "did you mean --optimizer.lr"),
    "a field elsewhere": (["train", "digits_sgd", "--optimizer.damping", "1"], "'--optimizer.damping'"),
    "a field without its part": (["train", "digits_sgd", "--lr", "0.1"], "'--lr'; did you mean --optimizer.lr"),
    "a base": (["train", "digits_sgd", "--optimizer", "curved"], "'curved' is no kind of Settings"),
    "a word": (["train", "digits_sgd", "word"], "'word'"),
    "a number": (["train", "digits_sgd", "--batch", "many"], "--batch: invalid literal.*'many'"),
    "no value": (["train", "digits_sgd", "--batch"], "--batch"),
    "lr": (["train", "digits_sgd", "--optimizer.lr", "-1"], "lr=-1"),
    "damping": (["train", "digits_spngd", "--optimizer.damping", "0"], "damping"),
    "a fisher": (["train", "digits_spngd", "--optimizer.fisher", "true"], "empirical.*sampled"),
    "a limit": (["train", "digits_kfac", "--optimizer.limit", "5"], "limit=5 .*refresh=2.*--optimizer.refresh None"),
    "a change": (
        ["train", "digits_kfac", "--optimizer.length", "plain", "--optimizer.largest-change", "1"],
        "largest_change=1 .*length=plain",
    ),
    "parts": (["train", "digits_sgd", "--micro-batch", "0"], "micro_batch=0 .*--micro-batch"),
    "mixup": (["train", "digits_sgd", "--regularisation.mixup", "-1"], "mixup=-1 .*--regularisation.mixup"),
    "erasing": (["train", "digits_sgd", "--regularisation.erase", "2"], "erase=2 .*--regularisation.erase"),
    "no mixup": (["train", "digits_sgd", "--regularisation.per-sample"], "per_sample .*--regularisation.mixup"),
    "a crop": (["train", "imagenet_spngd_4k", "--data.crop", "300"], "crop=300 .*size=256.*--data.crop"),
    "no images": (["train", "imagenet_kfac_4k", "--data.path", "no/such"], "'no/such'.*--data.path"),
    "batch": (["train", "digits_sgd", "--batch", "5000"], "batch=5000 .* 1437"),
    "data": (["train", "cifar100_resnet20_sgd", "--data.path", "no/such"], "'no/such'.*--data.path"),
    "ranks": (["train", "digits_sgd", "--ranks", "-2"], "ranks=-2"),
    "device": (["train", "digits_sgd", "--device", "tpu"], "device='tpu'"),
    "a task": (["compare", "digit"], "did you mean digits"),
    "trials": (["compare", "digits", "--trials", "-3"], "trials=-3"),
    "an optimizer": (["compare", "digits", "--optimizers", "SPNGDD"], "'SPNGDD'.*did you mean SPNGD"),
    "no curvature": (["coverage", "digits_sgd"], "no curvature"),
    "no run": (["report"], "natgrad report RUN"),
    "a run": (["report", "no/such"], "'no/such'"),
}


pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_in_one_line_and_writes_nothing(name, capsys, tmp_path):
    arguments, says = MISTAKES[name]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("natgrad: ")
    assert len(said.err.splitlines()) == 1
    assert re.search(says, said.err), said.err
    assert list(tmp_path.iterdir()) == []


def test_help_and_lists(capsys):
    assert main(["--help"]) == 0
    assert "natgrad compare TASK" in capsys.readouterr().out
    assert main(["train", "--list"]) == 0
    assert "digits_spngd" in capsys.readouterr().out
    assert main(["compare", "--list"]) == 0
    assert "digits" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["train", "digits_spngd", "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert "--optimizer.damping" in said
    assert "split between the two factors" in " ".join(said.replace("│", " ").split())


@pytest.mark.parametrize(("command", "flag"), [("train", "--resume"), ("coverage", "--batch"), ("plan", "--machine")])
def test_a_command_explains_itself_before_it_lists_names(command, flag, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: natgrad {command} RECIPE" in said
    assert flag in said
    assert f"natgrad {command} --list" in said
    assert "cifar100_momentum_16k" not in said


def test_help_of_a_comparison_names_tasks_and_flags(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    said = capsys.readouterr().out
    assert "cifar100-16" in said
    assert "--far-behind" in said


def test_usage_and_version_load_no_torch():
    """They answer at once."""
    for flag, says in (("--help", "natgrad train RECIPE"), ("--version", "natgrad 0.1.0 (torch")):
        code = f"import sys; from natgrad_lab.__main__ import main; main(['{flag}']); assert 'torch' not in sys.modules"
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert says in told.stdout


def test_a_reader_that_has_seen_enough_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "natgrad_lab", "train", "--list"]
    told = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (told.returncode, told.stderr) == (141, "")


def test_any_field_is_set_from_the_command_line(capsys):
    arguments = [
        "--optimizer.lr",
        "0.03",
        "--batch",
        "100",
        "--steps",
        "2",
        "--model.widths",
        "4",
        "4",
        "4",
        "--seed",
        "7",
        "--out",
        "here",
    ]
    assert main(["train", "digits_sgd", *arguments]) == 0
    recipe = json.loads(Path("here/recipe.json").read_text())["recipe"]
    assert (recipe["optimizer"]["lr"], recipe["batch"], recipe["seed"]) == (0.03, 100, 7)
    assert recipe["model"]["widths"] == [4, 4, 4]
    assert main(["train", "digits_sgd", *arguments]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["train", "digits_sgd", *arguments, "--overwrite"]) == 0
    assert main(["report", "here"]) == 0
    assert "<html" in Path("here/report.html").read_text()


def test_coverage_has_a_row_for_every_layer(capsys):
    assert main(["coverage", "digits_spngd"]) == 0
    said = capsys.readouterr().out
    for layer in ("conv", "blocks.0.conv1", "blocks.2.shortcut.0", "head", "all"):
        assert layer in said


def test_debugging_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("NATGRAD_DEBUG", "1")
    with pytest.raises(ValueError, match="no recipe"):
        main(["train", "nothing"])


def test_another_number_of_ranks_than_the_launcher_started_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["train", "digits_sgd", "--ranks", "2"]) == 2
    assert "--ranks 2 under a launcher of 4" in capsys.readouterr().err


def natgrad(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "natgrad_lab", *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.slow
def test_two_ranks_train_together():
    process = natgrad("train", "digits_spngd", "--ranks", "2", "--steps", "6", "--out", "both")
    said, wrong = process.communicate(timeout=120)
    assert process.returncode == 0, wrong
    assert said.count("step 6/6  epoch") == 1
    assert json.loads(Path("both/recipe.json").read_text())["machine"]["ranks"] == 2
    lines = [json.loads(line) for line in Path("both/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["traffic"]["statistics"] > 0


@pytest.mark.slow
def test_a_mistake_that_only_the_ranks_can_see_is_told_once(tmp_path):
    process = natgrad("train", "digits_sgd", "--ranks", "2", "--batch", "5000")
    said, wrong = process.communicate(timeout=120)
    assert process.returncode == 2
    assert wrong.splitlines() == ["natgrad: batch=5000 must be between 1 and the 1437 training samples"]
    assert said == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_ctrl_c_leaves_a_readable_folder(ranks, tmp_path):
    process = natgrad("train", "digits_sgd", "--ranks", ranks, "--epochs", "100000", "--out", "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, wrong = process.communicate(timeout=60)
    assert process.returncode == 130
    assert wrong == ""
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "interrupted"
    assert all(json.loads(line) for line in metrics.read_text().splitlines())


def test_a_resume_that_cannot_be_is_refused_before_data_are_read(monkeypatch, capsys):
    words = ["train", "digits_sgd", "--steps", "2", "--out", "here"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert re.search(r"finished after 2 steps in 0:\d\d of training, 0:\d\d in all", said)
    monkeypatch.setattr("natgrad_lab.data.Digits.load", lambda self: pytest.fail("data were read"))
    assert main([*words, "--resume", "--optimizer.lr", "0.3"]) == 2
    assert "optimizer.lr was 0.4, is 0.3" in capsys.readouterr().err


def test_a_stopped_run_is_offered_to_go_on(capsys):
    words = ["train", "digits_sgd", "--steps", "4", "--save-every", "2", "--out", "here"]
    assert main(words) == 0
    capsys.readouterr()
    assert main(words) == 2
    assert "is not empty; add --overwrite" in capsys.readouterr().err
    Path("here/summary.json").unlink()  # as a kill leaves it
    assert main(words) == 2
    assert "holds a run that was stopped; add --resume to go on" in capsys.readouterr().err
