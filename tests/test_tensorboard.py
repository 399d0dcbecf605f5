"""What is written for TensorBoard, read back with TensorBoard's own reader."""

import importlib.util
import math

import pytest

from natgrad_lab.__main__ import main
from natgrad_lab.train.evaluate import Score
from natgrad_lab.train.log import Journal, RunFolder
from natgrad_lab.train.loop import Step

pytest.importorskip("tensorboard")


def step(number, loss=None):
    loss = 1 / number if loss is None else loss
    second = {"damping": 1e-3, "refreshed": 0.5, "skipped": 0}
    return Step(number, number / 4, loss, 0.1, 0.25, 0.25 * number, 400.0, {"network": 0.2, "update": 0.05}, second)


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(folder), purge_orphaned_data=True)
    seen.Reload()
    return {tag: [(entry.step, entry.value) for entry in seen.Scalars(tag)] for tag in seen.Tags()["scalars"]}


def run(folder, first, last, resume_at=None, loss=None):
    journal = Journal(RunFolder(folder, {}, resume_at=resume_at, overwrite=True), tensorboard=True)
    for number in range(first, last + 1):
        journal.step(step(number, loss))
        if number % 4 == 0:
            journal.evaluation(step(number), Score(1.0, number / 10))
    journal.close("finished")


def test_numbers_by_step_and_by_epoch(tmp_path):
    run(tmp_path, 1, 8)
    by_step, by_epoch = (read(tmp_path / "tensorboard" / name) for name in ("steps", "epochs"))
    assert [place for place, _ in by_step["loss"]] == list(range(1, 9))
    assert by_step["stages/network"][0] == (1, pytest.approx(0.2))
    assert by_step["test/accuracy"] == [(4, pytest.approx(0.4)), (8, pytest.approx(0.8))]
    assert {"lr", "damping", "refreshed", "seconds", "images_per_second", "memory_gb"} <= set(by_step)
    assert by_epoch["epoch/loss"] == [
        (1, pytest.approx(sum(1 / n for n in range(1, 5)) / 4)),
        (2, pytest.approx(sum(1 / n for n in range(5, 9)) / 4)),
    ]
    assert by_epoch["epoch/test/accuracy"] == [(1, pytest.approx(0.4)), (2, pytest.approx(0.8))]


def test_a_run_taken_up_takes_back_what_was_told_later(tmp_path):
    run(tmp_path, 1, 12)
    run(tmp_path, 7, 12, resume_at=6, loss=9.0)
    by_step, by_epoch = (read(tmp_path / "tensorboard" / name) for name in ("steps", "epochs"))
    assert [place for place, _ in by_step["loss"]] == list(range(1, 13))
    assert [value for _, value in by_step["loss"][6:]] == [9.0] * 6
    assert [place for place, _ in by_epoch["epoch/loss"]] == [1, 2, 3]
    assert [value for _, value in by_epoch["epoch/loss"][1:]] == [9.0, 9.0]


def test_a_run_that_replaces_another_replaces_its_numbers(tmp_path):
    run(tmp_path, 1, 12)
    run(tmp_path, 1, 4)
    assert len(read(tmp_path / "tensorboard" / "steps")["loss"]) == 4


def test_a_loss_that_is_no_number_is_written(tmp_path):
    run(tmp_path, 1, 2, loss=math.nan)
    assert math.isnan(read(tmp_path / "tensorboard" / "steps")["loss"][0][1])


def test_without_the_package_the_option_is_refused_before_anything_is_done(tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else found(name))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits_sgd", "--tensorboard", "--ranks", "2"]) == 2
    assert "pip install 'natgrad[tensorboard]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_option_reaches_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits_sgd", "--steps", "2", "--model.widths", "4", "4", "4", "--tensorboard"]) == 0
    assert len(read(tmp_path / "runs/digits_sgd/tensorboard/steps")["loss"]) == 2
