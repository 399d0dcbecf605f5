"""The run folder's files: lines that a crash has broken, runs that are taken up, disks that are full."""

import json
import math
import os
import socket
import subprocess

import pytest
import torch

from natgrad_lab.train import environment
from natgrad_lab.train.evaluate import Score
from natgrad_lab.train.log import Journal, RunFolder
from natgrad_lab.train.loop import Step

ABOUT = {"name": "mine", "steps": 9, "recipe": {"seed": 3}, "machine": {"command": "natgrad train mine"}}


def step(number, loss=0.5):
    return Step(number, number / 4, loss, 0.1, 0.25, 0.25 * number, 400.0, {"network": 0.2, "update": 0.05})


def begun(folder, last):
    """A run that was killed after step `last`."""
    journal = Journal(RunFolder(folder, ABOUT))
    for number in range(1, last + 1):
        journal.step(step(number))
        if number % 2 == 0:
            journal.evaluation(step(number), Score(1.0, 0.1 * number))
            journal.event("checkpoint", path=f"at-{number}")


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_taken_up_keeps_the_lines_of_its_steps_and_goes_on(tmp_path):
    begun(tmp_path, 5)
    with (tmp_path / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"kind": "step", "st')
    again = {**ABOUT, "machine": {"command": "natgrad train mine --resume"}}
    folder = RunFolder(tmp_path, again, resume_at=4)
    assert folder.elapsed == 1.0
    journal = Journal(folder)
    journal.event("resumed", step=4)
    journal.step(step(5))
    journal.close("finished")
    told = [(line["kind"], line["step"]) for line in lines(tmp_path)]
    judged = [("evaluation", 2), ("checkpoint", 2)], [("evaluation", 4), ("checkpoint", 4)]
    numbers = [("step", number) for number in range(1, 6)]
    assert told == [*numbers[:2], *judged[0], *numbers[2:4], *judged[1], ("resumed", 4), numbers[4]]
    about = json.loads((tmp_path / "recipe.json").read_text())
    assert {key: about[key] for key in ABOUT} == ABOUT
    assert [start["step"] for start in about["starts"]] == [0, 4]
    assert [start["machine"]["command"] for start in about["starts"]] == [
        "natgrad train mine",
        "natgrad train mine --resume",
    ]
    assert (about["starts"][1]["host"], about["starts"][1]["pid"]) == (socket.gethostname(), os.getpid())
    assert "changed" not in about["starts"][1]


def test_what_was_changed_at_a_later_start_is_in_its_start(tmp_path):
    begun(tmp_path, 2)
    RunFolder(tmp_path, {**ABOUT, "steps": 20}, resume_at=2)
    about = json.loads((tmp_path / "recipe.json").read_text())
    assert about["steps"] == 9
    assert about["starts"][1]["changed"] == {"steps": 20}


def test_a_run_taken_up_from_its_start_keeps_no_line_of_a_step(tmp_path):
    begun(tmp_path, 3)
    assert RunFolder(tmp_path, ABOUT, resume_at=0).elapsed == 0.0
    assert lines(tmp_path) == []


def test_a_run_that_ended_is_open_again_once_it_is_taken_up(tmp_path):
    begun(tmp_path, 2)
    (tmp_path / "summary.json").write_text("{}")
    RunFolder(tmp_path, ABOUT, resume_at=2)
    assert not (tmp_path / "summary.json").exists()
    assert len(lines(tmp_path)) == 4


@pytest.mark.parametrize("content", [None, '{"na'])
def test_a_folder_without_a_recipe_cannot_be_taken_up(tmp_path, content):
    if content is not None:
        (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(ValueError, match=r"no readable recipe\.json") as refused:
        RunFolder(tmp_path, ABOUT, resume_at=2)
    assert str(tmp_path) in str(refused.value)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_lines_are_json_for_any_reader_also_where_the_loss_is_no_number(tmp_path):
    journal = Journal(RunFolder(tmp_path, ABOUT))
    journal.step(step(1, math.nan))
    journal.event("nan_loss", losses=[math.inf, 1.0])
    journal.close("failed")
    text = (tmp_path / "metrics.jsonl").read_text() + (tmp_path / "summary.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert [line.get("loss", line.get("losses")) for line in lines(tmp_path)] == [None, [None, 1.0]]


def test_the_end_names_the_command_that_goes_on(tmp_path):
    journal = Journal(RunFolder(tmp_path, ABOUT))
    journal.step(step(1))
    journal.close("interrupted", resume="natgrad train mine --resume")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["resume"], summary["steps"]) == (
        "interrupted",
        "natgrad train mine --resume",
        1,
    )
    assert summary["memory"] > 1e6


def test_a_full_disk_costs_lines_and_one_warning(tmp_path):
    folder = RunFolder(tmp_path, ABOUT)
    folder._metrics.close()
    folder._metrics = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.warns(UserWarning, match="lines are missing") as told:
        [folder.line("step", step=number) for number in (1, 2)]
    assert len(told) == 1


def test_memory_is_the_gpus_where_one_is_used(monkeypatch):
    assert environment.peak_memory() > 1e7
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12345)
    assert environment.peak_memory() == 12345


def test_a_commit_is_marked_where_the_package_differs_and_nowhere_else(tmp_path, monkeypatch):
    source, notes = tmp_path / "natgrad_lab" / "train" / "environment.py", tmp_path / "results.json"
    library = tmp_path / "natgrad" / "formula.py"
    for path in (source, library, notes):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    monkeypatch.setattr(environment, "__file__", str(source))
    assert environment.commit() is None  # outside of git
    name = ["-c", "user.name=x", "-c", "user.email=x@x"]
    for words in (["init", "-q"], ["add", "."], [*name, "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)
    head = environment.commit()
    assert len(head) == 12
    notes.write_text("2")
    assert environment.commit() == head
    for path in (source, library):
        path.write_text("2")
        assert environment.commit() == f"{head}-dirty"
        path.write_text("1")
