"""A checkpoint that was written to do harm, its digests with it: one line refuses it, and nothing runs or grows."""

import hashlib
import json
import os
import pickle

import pytest
import torch

from checkpoints import go_on, saved
from natgrad.parallel import World, run_threads
from natgrad_lab.data import Digits
from natgrad_lab.models import Mlp
from natgrad_lab.train import checkpoint
from natgrad_lab.train.loop import prepare
from natgrad_lab.train.optimizers import SpNgd
from natgrad_lab.train.recipe import Recipe
from natgrad_lab.train.resume import restore_all

RECIPE = Recipe(Digits(), Mlp((6,)), SpNgd(lr=0.05), batch=200, steps=8)


@pytest.fixture
def path(tmp_path, splits):
    """The checkpoint of step 4, after that of step 2."""
    job = prepare(RECIPE, World(), splits)
    for step in (2, 4):
        go_on(job, step)
        saved(job, tmp_path)
    return tmp_path / "step-00000004"


def seal(path, **change):
    """Write digests that fit what is there, and values that were changed; None drops one."""
    content = json.loads((path / "state.json").read_text())["content"] | change
    content = {key: value for key, value in content.items() if value is not None or key == "scaler"}
    own = path / "rank-0"
    sums = {file.name: checkpoint.digest(file) for file in own.iterdir() if file.name != "sums.json"}
    (own / "sums.json").write_text(json.dumps(sums))
    content["sums"] = {name: checkpoint.digest(path / name) for name in content["sums"]}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (path / "state.json").write_text(json.dumps({"content": content, "digest": digest}))


def refuse(path, splits, match, ranks=1):
    """Every rank refuses it, and names the checkpoint before it."""

    def work(world):
        job = prepare(RECIPE, world, splits)
        with pytest.raises(checkpoint.DamagedError, match=match) as raised:
            restore_all(job, path, False)
        assert "step-00000004" in str(raised.value)
        assert "add --checkpoint 2" in str(raised.value)
        return str(raised.value)

    assert len(set(run_threads(ranks, work))) == 1


WRONG = [[], "x", {"a": 1}, -1, 1e308, True, None]


@pytest.mark.parametrize("key", ["ranks", "steps", "step", "elapsed", "recipe", "groups"])
def test_values_of_another_kind(path, splits, key):
    for value in WRONG:
        if (key == "elapsed" and value in (1e308, True)) or (key == "groups" and value == {"a": 1}):
            continue  # a number of seconds, if a large one; the other is for what follows
        seal(path, **{key: value})
        refuse(path, splits, f"no {key} that can be used")


def test_groups_that_are_none(path, splits):
    seal(path, groups={"a": 1})
    refuse(path, splits, "cannot be used", ranks=2)


def test_digests_of_files_elsewhere(path):
    content = json.loads((path / "state.json").read_text())["content"]
    content["sums"]["../../../../dev/zero"] = "0"
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (path / "state.json").write_text(json.dumps({"content": content, "digest": digest}))
    with pytest.raises(checkpoint.DamagedError, match="no sums"):
        checkpoint.verify(path, 0, 1)


def test_a_list_of_files_elsewhere(path):
    content = json.loads((path / "state.json").read_text())["content"]
    (path / "rank-0/sums.json").write_text(json.dumps({"../../x": "0"}))
    content["sums"]["rank-0/sums.json"] = checkpoint.digest(path / "rank-0/sums.json")
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (path / "state.json").write_text(json.dumps({"content": content, "digest": digest}))
    with pytest.raises(checkpoint.DamagedError, match="no list of files in its folder"):
        checkpoint.verify(path, 0, 1)


@pytest.mark.parametrize("make", [os.mkfifo, lambda file: os.symlink("/dev/zero", file), os.mkdir])
def test_a_file_that_has_no_end(path, make):
    """To read it would wait for ever."""
    file = path / "rank-0/__0_0.distcp"
    file.unlink()
    make(file)
    with pytest.raises(checkpoint.DamagedError, match=r"is damaged: rank-0/__0_0\.distcp"):
        checkpoint.verify(path, 0, 1)


@pytest.mark.parametrize("name", ["model/1.weight", "optimizer/1.weight/A"])
def test_a_tensor_of_terabytes(path, splits, name):
    table = checkpoint.read_table(path)
    table.state_dict_metadata[name].size = torch.Size([10**7, 10**7])
    (path / ".metadata").write_bytes(pickle.dumps(table))
    seal(path)
    refuse(path, splits, f"{name} of shape .* would be 400,000,000,000,000 bytes")


def test_a_table_of_other_things(path, splits):
    table = checkpoint.read_table(path)
    table.state_dict_metadata = ["x"]
    (path / ".metadata").write_bytes(pickle.dumps(table))
    seal(path)
    refuse(path, splits, r"\.metadata cannot be used")


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_code_among_the_tensors(path, splits, tmp_path):
    """All tensors are said to lie where the code does."""
    file, mark = path / "rank-0/__0_0.distcp", tmp_path / "ran"
    table = checkpoint.read_table(path)
    size = file.stat().st_size
    torch.save({"x": Evil(mark)}, file)
    payload = file.read_bytes()
    file.write_bytes(payload + b"\0" * size)
    for place in table.storage_data.values():
        place.offset, place.length = 0, len(payload)
    (path / ".metadata").write_bytes(pickle.dumps(table))
    seal(path)
    refuse(path, splits, r"its tensors cannot be read \((?!.*Traceback)", ranks=2)
    assert not mark.exists()
