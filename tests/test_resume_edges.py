"""Runs taken up again where something has changed: from an older checkpoint, with other values, at their end."""

import json
import pickle
import resource
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from checkpoints import CONV, go_on, recipe_with, saved
from natgrad.parallel import World
from natgrad_lab.data import Regularisation
from natgrad_lab.train import checkpoint, loop
from natgrad_lab.train.loop import prepare
from natgrad_lab.train.optimizers import KFac, Seng, Sgd, SpNgd
from natgrad_lab.train.recipe import described
from natgrad_lab.train.run import Options, resume_command, run
from natgrad_lab.train.state import check_recipe, restore
from test_resume import MLP, TOTAL, damage, interrupt_at, options, summary


def start(recipe, splits, folder, step=4):
    job = prepare(recipe, World(), splits)
    go_on(job, step)
    return job, saved(job, folder)


def test_a_run_that_is_stopped_where_it_is_judged_is_interrupted(tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 8)  # judged every 4 steps
    assert run("mine", MLP, options(tmp_path), World()) == "interrupted"
    assert summary(tmp_path)["status"] == "interrupted"
    assert not (tmp_path / "run/model.pt").exists()


def test_a_run_that_is_stopped_in_its_last_step_has_finished(tmp_path, monkeypatch):
    interrupt_at(monkeypatch, TOTAL)
    assert run("mine", MLP, options(tmp_path), World()) == "finished"


def test_going_on_from_an_older_checkpoint_sets_those_after_it_aside(tmp_path, monkeypatch):
    run("mine", MLP, options(tmp_path), World())
    damage(tmp_path, 24)
    interrupt_at(monkeypatch, 18)
    assert run("mine", MLP, options(tmp_path, auto_resume=True, save_every=17, keep=1), World()) == "interrupted"
    folder = tmp_path / "run/checkpoints"
    assert checkpoint.found(folder) == [18]
    checkpoint.verify(folder / "step-00000018", 0, 1)
    assert (folder / "step-00000024.set-aside").is_dir()


def test_checkpoints_none_of_which_can_be_read_are_not_thrown_away(tmp_path):
    run("mine", MLP, options(tmp_path), World())
    damage(tmp_path, 24)
    damage(tmp_path, 16)
    with pytest.raises(ValueError, match=r"step-00000024.* is damaged.*none of 2 checkpoints.*--overwrite"):
        run("mine", MLP, options(tmp_path, auto_resume=True), World())
    assert checkpoint.found(tmp_path / "run/checkpoints") == [16, 24]


def test_a_finished_run_that_is_resumed_keeps_its_result(tmp_path):
    run("mine", MLP, options(tmp_path), World())
    before = summary(tmp_path)
    assert run("mine", MLP, options(tmp_path, resume=True), World()) == "finished"
    after = summary(tmp_path)
    for name in ("steps", "loss", "seconds", "test_accuracy", "test_loss"):
        assert after[name] == before[name], name


def test_a_new_learning_rate_is_what_tied_momentum_goes_by(tmp_path, splits):
    recipe = recipe_with(SpNgd(lr=0.1, coefficient="tied"))
    _, path = start(recipe, splits, tmp_path)
    job = prepare(recipe_with(SpNgd(lr=0.2, coefficient="tied")), World(), splits)
    restore(job, path, changes=True)
    assert [group["initial_lr"] for group in job.optimizer.param_groups] == [0.2]


def test_mixup_may_be_switched_off_or_on(tmp_path, splits):
    _, path = start(CONV, splits, tmp_path)
    plain = replace(CONV, regularisation=Regularisation())
    job = prepare(plain, World(), splits)
    restore(job, path, changes=True)
    assert len(go_on(job, 9)) == 5
    _, path = start(plain, splits, tmp_path / "plain")
    job = prepare(CONV, World(), splits)
    restore(job, path, changes=True)
    assert len(go_on(job, 9)) == 5


@pytest.mark.parametrize(("old", "new"), [(Sgd(), KFac()), (KFac(), Sgd())])
def test_another_kind_of_optimizer_is_refused_whatever_is_accepted(tmp_path, splits, old, new):
    _, path = start(recipe_with(old), splits, tmp_path)
    with pytest.raises(ValueError, match=rf"state of {type(old).__name__}, not of {type(new).__name__}"):
        restore(prepare(recipe_with(new), World(), splits), path, changes=True)


def test_a_recipe_of_an_earlier_version_has_the_names_of_today(tmp_path):
    recipe = recipe_with(KFac(ema_decay=0.3, rows_per_dim=4))
    stored = json.loads(json.dumps(described(recipe)))
    optimizer = stored["optimizer"]
    optimizer["decay"], optimizer["samples"] = optimizer.pop("ema_decay"), optimizer.pop("rows_per_dim")
    del optimizer["norm_damping"]  # as if it were new: it is as it was where it has its default
    assert not check_recipe(tmp_path, {"recipe": stored}, recipe, changes=False)
    for name, value in {"ema_decay": 0.9, "rows_per_dim": None, "norm_damping": 16.0}.items():
        other = recipe_with(replace(KFac(ema_decay=0.3, rows_per_dim=4, norms="unitwise"), **{name: value}))
        with pytest.raises(ValueError, match=rf"optimizer\.{name} was [\d.]+, is {value}"):
            check_recipe(tmp_path, {"recipe": stored}, other, changes=False)
    samples = {"recipe": json.loads(json.dumps(described(recipe_with(Seng(samples=64)))))}
    assert not check_recipe(tmp_path, samples, recipe_with(Seng(samples=64)), changes=False)


def test_running_means_that_are_not_there_are_refused_as_such(tmp_path, splits):
    _, path = start(replace(CONV, average=None), splits, tmp_path)
    with pytest.raises(ValueError, match="no running means"):
        restore(prepare(CONV, World(), splits), path, changes=True)


def test_another_network_is_told_by_its_buffers_too(tmp_path, splits):
    _, path = start(CONV, splits, tmp_path)
    job = prepare(CONV, World(), splits)
    job.model.register_buffer("more", torch.zeros(3))
    with pytest.raises(ValueError, match="of another network: more is missing, not \\(3,\\)"):
        restore(job, path)


class Counting(nn.Linear):
    """Has state that is neither parameter nor buffer."""

    calls = 0

    def get_extra_state(self):
        return torch.tensor(self.calls)

    def set_extra_state(self, state):
        self.calls = int(state)

    def forward(self, input):
        self.calls += self.training
        return super().forward(input)


def test_state_that_a_module_makes_itself_comes_back(tmp_path, splits):
    recipe = replace(MLP, steps=9)
    job = prepare(recipe, World(), splits)
    job.model.more = Counting(2, 2)
    job.model.more.calls = 7
    path = saved(job, tmp_path)
    job = prepare(recipe, World(), splits)
    job.model.more = Counting(2, 2)
    restore(job, path)
    assert job.model.more.calls == 7


def test_the_command_to_resume_does_not_go_back_again(monkeypatch):
    words = "train mine --resume --checkpoint 16 --keep 3 --checkpoint=8 --accept-changes --out /x"
    monkeypatch.setattr(sys, "argv", ["natgrad", *words.split()])
    assert resume_command() == "natgrad train mine --keep 3 --accept-changes --out /x --resume"


@pytest.mark.parametrize("where", ["/etc/hostname", "../step-00000002/rank-0/__0_0.distcp"])
def test_a_table_of_contents_names_no_file_outside_its_folder(tmp_path, splits, where):
    _, path = start(recipe_with(Sgd(lr=0.1)), splits, tmp_path)
    table = checkpoint.read_table(path)
    index = next(iter(table.storage_data))
    table.storage_data[index] = replace(table.storage_data[index], relative_path=where)
    (path / ".metadata").write_bytes(pickle.dumps(table))
    with pytest.raises(checkpoint.DamagedError, match="outside"):
        checkpoint.contents(path)


def test_a_full_disk_at_the_end_is_told_in_one_line(tmp_path, monkeypatch):
    save = torch.save

    def full(state, stream, *more, **options):
        if not str(getattr(stream, "name", "")).endswith("model.pt.part"):
            return save(state, stream, *more, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match=r"model\.pt' cannot be written: No space left on device; make room, and add"):
        run("mine", MLP, options(tmp_path, save_every=12), World())
    assert summary(tmp_path)["status"] == "failed"
    assert not list((tmp_path / "run").glob("*.part"))
    monkeypatch.setattr(torch, "save", save)
    assert run("mine", MLP, options(tmp_path, resume=True), World()) == "finished"


@pytest.mark.filterwarnings("ignore:.*cannot be written")
@pytest.mark.parametrize(("size", "name"), [(200, "recipe.json"), (6000, "model.pt")])
def test_a_limit_on_the_size_of_files_is_told_in_one_line(tmp_path, size, name):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = rf"/run/{name}' cannot be written.*: File too large; raise the limit on the size of files \(ulimit -f\), "
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        with pytest.raises(ValueError, match=said) as told:
            run("mine", MLP, options(tmp_path), World())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(told.value)


def test_a_folder_that_cannot_be_made_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written or read: Not a directory; name another --out"):
        run("mine", MLP, Options(out=str(tmp_path / "file/run")), World())


class Talking(nn.Flatten):
    """Has state that is no tensor."""

    def get_extra_state(self):
        return {"said": "much"}

    def set_extra_state(self, state):
        pass


def test_what_cannot_be_saved_is_told_before_the_first_step(tmp_path, monkeypatch):
    build = loop.build_model
    monkeypatch.setattr(loop, "build_model", lambda recipe: nn.Sequential(Talking(), build(recipe)))
    with pytest.raises(ValueError, match=r"0\._extra_state .* is a dict, which no checkpoint holds; .*--save-every 0"):
        run("mine", MLP, options(tmp_path), World())
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert run("mine", replace(MLP, epochs=1), options(tmp_path, save_every=0), World()) == "finished"
