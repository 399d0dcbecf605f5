"""`--resume` and what goes wrong: interrupted runs, lost losses, two runs in one folder, ranks that disagree."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from natgrad.parallel import World, run_threads
from natgrad_lab.data import Digits
from natgrad_lab.models import Mlp
from natgrad_lab.train import loop
from natgrad_lab.train.optimizers import Sgd, SpNgd
from natgrad_lab.train.ranks import Lock, everybody, on_first
from natgrad_lab.train.recipe import Recipe
from natgrad_lab.train.resume import check_agreement, choose
from natgrad_lab.train.run import Options, check, run

MLP = Recipe(Digits(), Mlp((16,)), SpNgd(lr=0.05), batch=200, epochs=3, evaluate_every=4, seed=3)
TOTAL = 24


def options(tmp_path, **values):
    return Options(out=str(tmp_path / "run"), **values)


def lines(tmp_path, kind="step"):
    read = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    return [line for line in read if line["kind"] == kind]


def model(folder):
    return torch.load(folder / "model.pt", weights_only=True)


def summary(tmp_path):
    return json.loads((tmp_path / "run/summary.json").read_text())


def interrupt_at(monkeypatch, step):
    descend = loop.descend

    def and_signal(job, batch, number, *rest):
        if number == step:
            signal.raise_signal(signal.SIGTERM)
        return descend(job, batch, number, *rest)

    monkeypatch.setattr(loop, "descend", and_signal)
    return descend


@pytest.mark.parametrize("save_every", [None, 5])
def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(tmp_path, monkeypatch, capsys, save_every):
    whole = Options(out=str(tmp_path / "whole"))
    assert run("mine", MLP, whole, World()) == "finished"
    descend = interrupt_at(monkeypatch, 10)
    assert run("mine", MLP, options(tmp_path, save_every=save_every), World()) == "interrupted"
    assert "--resume" in capsys.readouterr().out
    assert summary(tmp_path)["resume"].endswith("--resume")
    monkeypatch.setattr(loop, "descend", descend)
    assert run("mine", MLP, options(tmp_path, resume=True), World()) == "finished"
    one, other = model(tmp_path / "whole"), model(tmp_path / "run")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, TOTAL + 1))
    assert lines(tmp_path, "resumed")[0]["step"] == 10
    elapsed = [line["elapsed"] for line in lines(tmp_path)]
    assert elapsed == sorted(elapsed)


def test_a_finished_run_that_is_resumed_is_left_as_it_is(tmp_path):
    run("mine", MLP, options(tmp_path), World())
    before = model(tmp_path / "run")
    assert run("mine", MLP, options(tmp_path, resume=True), World()) == "finished"
    assert all(torch.equal(value, before[name]) for name, value in model(tmp_path / "run").items())
    assert len(lines(tmp_path)) == TOTAL


def test_auto_resume_begins_or_goes_on(tmp_path, monkeypatch):
    descend = interrupt_at(monkeypatch, 6)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"kind": "step", "st')  # killed before its first checkpoint
    assert run("mine", MLP, options(tmp_path, auto_resume=True), World()) == "interrupted"
    monkeypatch.setattr(loop, "descend", descend)
    assert run("mine", MLP, options(tmp_path, auto_resume=True), World()) == "finished"
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, TOTAL + 1))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"resume": True}, "no checkpoint in .*leave --resume out"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
        ({"checkpoint": 3}, "--checkpoint says nothing without --resume"),
        ({"accept_changes": True}, "--accept-changes says nothing without --resume"),
        ({"keep": 0}, "keep=0 must be at least 1"),
        ({"bad_steps": 0}, "bad_steps=0 must be at least 1"),
        ({"save_every": -1}, "save_every=-1 must be at least 0"),
        ({"max_restarts": 2}, "--max-restarts is for ranks that are started here"),
        ({"max_restarts": 2, "ranks": 2, "save_every": 0}, "--save-every 0 writes none"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_starts(tmp_path, values, text):
    with pytest.raises(ValueError, match=text):
        check("mine", MLP, options(tmp_path, **values))


def damage(tmp_path, step):
    path = tmp_path / f"run/checkpoints/step-{step:08d}/rank-0/__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_offered(tmp_path):
    run("mine", MLP, options(tmp_path), World())
    damage(tmp_path, 24)
    with pytest.raises(ValueError, match=r"step-00000024.* is damaged: rank-0/__0_0.*step 16: add --checkpoint 16"):
        run("mine", MLP, options(tmp_path, resume=True), World())
    assert run("mine", MLP, options(tmp_path, resume=True, checkpoint=16), World()) == "finished"
    damage(tmp_path, 16)
    with pytest.raises(ValueError, match=r"there is none before it"):
        run("mine", MLP, options(tmp_path, resume=True, checkpoint=16), World())
    with pytest.raises(ValueError, match=r"no checkpoint of step 5 .*there are 16, 24"):
        run("mine", MLP, options(tmp_path, resume=True, checkpoint=5), World())


def test_a_job_that_is_queued_again_passes_over_a_damaged_checkpoint(tmp_path):
    run("mine", MLP, options(tmp_path), World())
    whole = model(tmp_path / "run")
    damage(tmp_path, 24)
    assert run("mine", MLP, options(tmp_path, auto_resume=True), World()) == "finished"
    assert "rank-0/__0_0.distcp" in lines(tmp_path, "damaged")[0]["reason"]
    assert lines(tmp_path, "resumed")[0]["step"] == 16
    assert all(torch.equal(value, whole[name]) for name, value in model(tmp_path / "run").items())


def test_all_ranks_refuse_what_one_finds_damaged(tmp_path):
    run("mine", MLP, options(tmp_path), World())
    damage(tmp_path, 24)

    def work(world):
        with pytest.raises(ValueError, match=r"rank-0/__0_0\.distcp is not as it was written"):
            choose(tmp_path / "run/checkpoints", None, world, None)
        return True

    assert run_threads(3, work) == [True] * 3


def test_a_lost_loss_stops_the_run_and_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    descend = loop.descend

    def lose(job, batch, step, clock):
        loss = descend(job, batch, step, clock)
        return loss * float("nan") if step == 9 or step > 17 else loss

    monkeypatch.setattr(loop, "descend", lose)
    recipe = replace(MLP, epochs=9)
    with pytest.raises(ValueError, match=r"not been finite for 3 steps, up to step 20: .*step-00000016'"):
        run("mine", recipe, options(tmp_path, bad_steps=3), World())
    assert summary(tmp_path)["status"] == "failed"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(ValueError, match="not been finite for 3 steps"):  # trying again would change nothing
        run("mine", recipe, options(tmp_path, bad_steps=3), World())


def test_one_run_writes_to_a_folder_at_a_time(tmp_path):
    lock = Lock(tmp_path / "run")
    with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
        run("mine", MLP, options(tmp_path), World())
    lock.release()
    assert run("mine", replace(MLP, epochs=1), options(tmp_path), World()) == "finished"
    assert not (tmp_path / "run/.lock").exists()


def test_every_rank_raises_what_the_first_one_met():
    def refuse():
        raise ValueError("no, for a reason: é")

    def work(world):
        with pytest.raises(ValueError, match="no, for a reason: é"):
            on_first(world, refuse)
        return on_first(world, lambda: 5)

    assert run_threads(3, work) == [5, None, None]


def test_everybody_hears_what_any_rank_says():
    said = [["b.jpg", "é.jpg"], [], ["a.jpg", "b.jpg"]]
    assert run_threads(3, lambda world: everybody(world, said[world.rank])) == [["a.jpg", "b.jpg", "é.jpg"]] * 3
    assert run_threads(2, lambda world: everybody(world, [])) == [[], []]
    assert everybody(World(), ["x"]) == ["x"]


def test_ranks_that_disagree_on_the_recipe_are_refused_at_the_start():
    def work(world):
        path = f"/somewhere/on/host/{world.rank}"  # may differ
        check_agreement(replace(MLP, data=Digits()), world)
        other = replace(MLP, optimizer=Sgd(lr=0.1 + world.rank), seed=world.rank)
        with pytest.raises(ValueError, match="ranks disagree on optimizer, seed; start all of them with the same"):
            check_agreement(other, world)
        return path

    run_threads(2, work)


@pytest.mark.slow
def test_a_rank_that_is_killed_is_restarted_and_changes_nothing(tmp_path):
    words = [
        sys.executable,
        "-m",
        "natgrad_lab",
        "train",
        "digits_sgd",
        "--epochs",
        "12",
        "--save-every",
        "2",
        "--ranks",
        "2",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    first, second = tmp_path / "first", tmp_path / "second"
    subprocess.run([*words, "--out", str(first)], check=True, env=env, capture_output=True, timeout=200)
    process = subprocess.Popen(
        [*words, "--out", str(second), "--max-restarts", "1"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while process.poll() is None and not list((second / "checkpoints").glob("step-????????")):
        time.sleep(0.01)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said.decode()
    assert "Traceback" not in said.decode()
    one, other = model(first), model(second)
    assert all(torch.equal(one[name], other[name]) for name in one)
    told = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told if line["kind"] == "step"] == list(range(1, 37))
    assert [line for line in told if line["kind"] == "resumed"]
