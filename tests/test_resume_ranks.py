"""Several ranks take a run up: in the words of the first, on hosts that count and see different things."""

import threading
import types

import pytest

from checkpoints import go_on, recipe_with, saved
from natgrad.parallel import World, run_threads
from natgrad_lab.train import ranks
from natgrad_lab.train.loop import prepare
from natgrad_lab.train.optimizers import Sgd
from natgrad_lab.train.ranks import Lock
from natgrad_lab.train.resume import choose, compare, restarted
from natgrad_lab.train.run import run
from test_resume import MLP, damage, options


def test_parts_on_hosts_that_share_no_folder_are_told_as_such(tmp_path, splits):
    def work(world):
        told = []
        job = prepare(recipe_with(Sgd(lr=0.1)), world, splits)
        go_on(job, 1)
        saved(job, tmp_path / f"host-{world.rank}", lambda kind, **values: told.append((kind, values["reason"])))
        return told

    (told,), _ = run_threads(2, work)
    assert told == ("not_saved", "parts of ranks 1 are not there: --out must be a folder that all hosts share")


@pytest.mark.parametrize("asked", [None, 5])
def test_all_ranks_refuse_in_the_words_of_the_first(tmp_path, asked):
    run("mine", MLP, options(tmp_path), World())
    damage(tmp_path, 24)
    text = r"24.* is damaged.*step 16: add --checkpoint 16" if asked is None else r"step 5 .*there are 16, 24"

    def work(world):
        folder = tmp_path / ("run/checkpoints" if world.rank == 0 or asked is None else "not-seen-here")
        with pytest.raises(ValueError, match=text):
            choose(folder, asked, world, None)
        return True

    assert run_threads(2, work) == [True, True]


def test_hosts_that_count_restarts_differently_agree(monkeypatch):
    """A launcher does not count a restart that another host's has begun."""
    told = threading.local()

    class Environment(dict):
        def get(self, name, default=None):
            return told.count

    monkeypatch.setattr("natgrad_lab.train.resume.os", types.SimpleNamespace(environ=Environment()))

    def work(world, counts):
        told.count = counts[world.rank]
        return restarted(world)

    assert run_threads(2, lambda world: work(world, "01")) == [True, True]
    assert run_threads(2, lambda world: work(world, "00")) == [False, False]


def test_values_that_differ_are_named():
    def work(world):
        told = {"version": 1} if world.rank else {"version": 2}
        with pytest.raises(ValueError, match="ranks disagree on version"):
            compare(told, world)
        return True

    assert run_threads(2, work) == [True, True]


def test_a_lock_is_not_taken_on_a_file_that_has_gone(tmp_path, monkeypatch):
    """The one before releases between our opening the file and our locking it: the next one must see ours."""
    (tmp_path / "run").mkdir()
    first, lock = Lock(tmp_path / "run"), ranks.fcntl.flock

    def late(file, how):
        monkeypatch.setattr(ranks.fcntl, "flock", lock)
        first.release()
        lock(file, how)

    monkeypatch.setattr(ranks.fcntl, "flock", late)
    second = Lock(tmp_path / "run")
    with pytest.raises(ValueError, match="another run is writing"):
        Lock(tmp_path / "run")
    second.release()


def test_a_folder_is_not_held_where_there_are_no_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "fcntl", None)
    Lock(tmp_path / "run").release()
    assert not (tmp_path / "run").exists()
