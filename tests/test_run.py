"""The run folder: what a run leaves behind, however it ends."""

import json
import math
import signal
from dataclasses import replace

import pytest
import torch

from natgrad.parallel import World, run_threads
from natgrad_lab.data import Digits
from natgrad_lab.models import Mlp
from natgrad_lab.train import loop
from natgrad_lab.train.log import RunFolder, write_json
from natgrad_lab.train.loop import prepare, steps
from natgrad_lab.train.optimizers import AdamW, KFac, Sgd, SpNgd
from natgrad_lab.train.recipe import Recipe
from natgrad_lab.train.run import Options, check, run
from natgrad_lab.train.stop import Stop

MLP = Recipe(Digits(), Mlp((16,)), Sgd(lr=0.1), batch=101, steps=4, seed=3)
OPTIMIZERS = [Sgd(lr=0.1, nesterov=True), AdamW(), SpNgd(lr=0.1), KFac(lr=0.1, refresh=2)]


def weights(job):
    return torch.cat([parameter.detach().flatten() for parameter in job.model.parameters()])


def trained(recipe, world, splits):
    job = prepare(recipe, world, splits)
    return job, list(steps(job))


def test_a_run_leaves_a_folder_that_tells_everything(tmp_path):
    out = tmp_path / "run"
    recipe = replace(MLP, evaluate_every=2, optimizer=SpNgd(lr=0.1))
    assert run("mine", recipe, Options(out=str(out), train_loss=True), World()) == "finished"
    about = json.loads((out / "recipe.json").read_text())
    assert about["recipe"]["optimizer"]["kind"] == "SpNgd"
    assert about["recipe"]["seed"] == 3
    assert {"commit", "versions", "device", "ranks", "command"} <= set(about["machine"])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [2, 4]
    assert {"refreshed", "intervals", "traffic", "stages", "lr", "seconds", "memory"} <= set(lines[0])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["steps"] == 4
    assert {"test_accuracy", "train_loss", "skipped"} <= set(summary)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_leaves_a_readable_folder(tmp_path, monkeypatch, number):
    descend, taken = loop.descend, []

    def descend_and_signal(*arguments):
        taken.append(1)
        if len(taken) == 3:
            signal.raise_signal(number)
        return descend(*arguments)

    monkeypatch.setattr(loop, "descend", descend_and_signal)
    before = signal.getsignal(number)
    assert run("mine", replace(MLP, steps=9), Options(out=str(tmp_path / "run")), World()) == "interrupted"
    assert signal.getsignal(number) is before
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if line["kind"] == "step"]) == 3
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "interrupted"


def test_a_second_signal_stops_at_once():
    with Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_all_ranks_stop_after_the_step_in_which_one_is_asked(splits):
    def work(world):
        job = prepare(replace(MLP, steps=9), world, splits)
        asked = iter([False, world.rank == 1, False])
        return [record.step for record in steps(job, lambda: next(asked))]

    assert run_threads(2, work) == [[1, 2], [1, 2]]


def test_a_crash_is_told_in_the_summary(tmp_path, monkeypatch):
    def crash(*arguments):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(loop, "descend", crash)
    with pytest.raises(RuntimeError, match="out of luck"):
        run("mine", MLP, Options(out=str(tmp_path / "run")), World())
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "failed"


def test_a_used_folder_is_refused_unless_told_to_overwrite(tmp_path):
    (tmp_path / "other").write_text("kept")
    with pytest.raises(ValueError, match="--overwrite"):
        RunFolder(tmp_path, {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["other"]
    RunFolder(tmp_path, {"first": 1}, overwrite=True).close("finished")
    RunFolder(tmp_path, {"second": 2}, overwrite=True)
    assert not (tmp_path / "summary.json").exists()
    assert (tmp_path / "other").read_text() == "kept"
    about = json.loads((tmp_path / "recipe.json").read_text())
    assert (about["second"], "first" in about, len(about["starts"])) == (2, False, 1)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("recipe", "options", "says"),
    [
        (replace(MLP, optimizer=Sgd(lr=0.0)), Options(), "lr=0"),
        (replace(MLP, optimizer=Sgd(lr=math.nan)), Options(), "lr=nan"),
        (replace(MLP, optimizer=Sgd(momentum=0.0, nesterov=True)), Options(), "nesterov"),
        (replace(MLP, optimizer=SpNgd(damping=-1.0)), Options(), "damping"),
        (replace(MLP, batch=0), Options(), "batch=0"),
        (replace(MLP, steps=-3), Options(), "steps=-3"),
        (replace(MLP, epochs=math.inf), Options(), "epochs=inf"),
        (MLP, Options(ranks=0), "ranks=0"),
        (MLP, Options(device="tpu"), "device='tpu'"),
    ],
)
def test_impossible_values_are_refused_before_anything_is_written(recipe, options, says, tmp_path):
    options = replace(options, out=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=says) as refused:
        check("mine", recipe, options)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_the_data_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="batch=2000 must be between 1 and the 1437"):
        run("mine", replace(MLP, batch=2000), Options(out=str(tmp_path / "run")), World())
    assert not (tmp_path / "run").exists()
