"""Checkpoints on disk: whole or not there, damage found, nothing run, other runs refused."""

import json
import pickle
import resource
from dataclasses import replace

import pytest
import torch

from checkpoints import go_on, recipe_with, saved
from natgrad.optim.state_dict import DistributedState
from natgrad.parallel import World, run_threads
from natgrad_lab.models import CifarResNet
from natgrad_lab.train import checkpoint
from natgrad_lab.train.loop import prepare
from natgrad_lab.train.optimizers import AdamW, Sgd, SpNgd
from natgrad_lab.train.state import restore


@pytest.fixture
def two(tmp_path, splits):
    """A folder with the checkpoints of steps 2 and 4."""
    job = prepare(recipe_with(Sgd(lr=0.1)), World(), splits)
    for step in (2, 4):
        go_on(job, step)
        saved(job, tmp_path)
    return tmp_path


FILES = [".metadata", "state.json", "rank-0/sums.json", "rank-0/__0_0.distcp"]


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_refused_by_name(two, file, harm):
    path = two / "step-00000004" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(content if harm == "flip" else content[:-5])
    with pytest.raises(checkpoint.DamagedError, match="step-00000004"):
        checkpoint.verify(two / "step-00000004", 0, 1)
    checkpoint.verify(two / "step-00000002", 0, 1)


def test_nothing_in_a_checkpoint_runs(two):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    folder = two / "step-00000004"
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(checkpoint.DamagedError, match=r"builtins\.print"):
        checkpoint.contents(folder)


def test_only_whole_checkpoints_are_found(two):
    (two / "step-00000006.part").mkdir()
    (two / "step-00000008.set-aside").mkdir()
    (two / "notes").mkdir()
    assert checkpoint.found(two) == [2, 4]


def test_the_last_ones_stay_and_half_written_ones_go(two, splits):
    job = prepare(recipe_with(Sgd(lr=0.1)), World(), splits)
    restore(job, two / "step-00000004")
    (two / "step-00000005.part").mkdir()
    go_on(job, 6)
    saved(job, two)
    assert checkpoint.found(two) == [4, 6]
    assert not list(two.glob("*.part"))


def test_another_way_from_an_older_checkpoint_sets_the_newer_one_aside(two, splits):
    job = prepare(recipe_with(Sgd(lr=0.1)), World(), splits)
    restore(job, two / "step-00000002")
    go_on(job, 4)
    saved(job, two)
    assert checkpoint.found(two) == [2, 4]
    assert (two / "step-00000004.set-aside").is_dir()


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(two, splits):
    job, told = prepare(recipe_with(Sgd(lr=0.1)), World(), splits), []
    restore(job, two / "step-00000004")
    go_on(job, 5)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        saved(job, two, lambda kind, **values: told.append((kind, values)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (kind, values), *_ = told
    limit = "cannot be written: File too large; raise the limit on the size of files (ulimit -f)"
    assert (kind, values["reason"]) == ("not_saved", f"{str(two / 'step-00000005.part')!r} {limit}")
    assert checkpoint.found(two) == [2, 4]
    assert not list(two.glob("*.part"))
    checkpoint.verify(two / "step-00000004", 0, 1)
    assert len(go_on(job, 7)) == 2


def test_one_rank_that_cannot_write_costs_the_checkpoint_on_all(tmp_path, splits, monkeypatch):
    write = checkpoint.write_part

    def fail(folder, rank, tensors):
        if rank == 1:
            raise OSError(28, "No space left on device")
        write(folder, rank, tensors)

    monkeypatch.setattr(checkpoint, "write_part", fail)

    def work(world):
        told = []
        job = prepare(recipe_with(Sgd(lr=0.1)), world, splits)
        go_on(job, 1)
        saved(job, tmp_path, lambda kind, **values: told.append(kind))
        return told, len(go_on(job, 3))

    assert run_threads(2, work) == [(["not_saved"], 2), ([], 2)]
    assert checkpoint.found(tmp_path) == []


def test_weights_that_are_not_finite_are_not_kept(two, splits):
    job, told = prepare(recipe_with(Sgd(lr=0.1)), World(), splits), []
    restore(job, two / "step-00000004")
    with torch.no_grad():
        next(job.model.parameters())[0] = float("nan")
    saved(job, two, lambda kind, **values: told.append((kind, values["reason"])))
    assert told == [("not_saved", "a weight is not finite")]
    assert checkpoint.found(two) == [2, 4]


def test_another_recipe_is_refused_naming_what_differs(two, splits):
    other = replace(recipe_with(Sgd(lr=0.2)), batch=50)
    job = prepare(other, World(), splits)
    with pytest.raises(ValueError, match=r"batch was 60, is 50; optimizer\.lr was 0\.1, is 0\.2; .*--accept-changes"):
        restore(job, two / "step-00000004")
    restore(job, two / "step-00000004", changes=True)
    assert job.optimizer.param_groups[0]["lr"] == 0.2
    assert len(go_on(job, 9)) == 5
    with pytest.raises(ValueError, match=r"optimizer was Sgd, is AdamW"):
        restore(prepare(recipe_with(AdamW()), World(), splits), two / "step-00000004")


def test_another_network_is_refused(two, splits):
    job = prepare(replace(recipe_with(Sgd(lr=0.1)), model=CifarResNet(8, (4, 6, 9))), World(), splits)
    with pytest.raises(ValueError, match="of another network: model/"):
        restore(job, two / "step-00000004", changes=True)


def test_a_checkpoint_with_squares_is_read(tmp_path, splits, monkeypatch):
    """Format 1, as earlier versions wrote it."""
    for name, value in {"LEAST": 3, "BLOCK": 1, "SLABBED": 4, "ROWS": 2}.items():
        monkeypatch.setattr(f"natgrad.triangles.{name}", value)
    job = prepare(recipe_with(SpNgd(lr=0.1)), World(), splits)
    go_on(job, 2)

    held = DistributedState.held

    def squared(state):
        cells = {cell.layer.parameters[0]: cell for cell in state.cells}
        parts = held(state)
        for parameter, cell in cells.items():
            parts[parameter] = {key: cell.square(key, value) for key, value in parts[parameter].items()}
        return parts

    with monkeypatch.context() as patch:
        patch.setattr(DistributedState, "held", squared)
        patch.setattr(checkpoint, "FORMAT", 1)
        saved(job, tmp_path)
    table = checkpoint.contents(tmp_path / "step-00000002")
    assert any(name.endswith("/A") and len(entry.size) == 3 for name, entry in table.items())
    other = prepare(recipe_with(SpNgd(lr=0.1)), World(), splits)
    restore(other, tmp_path / "step-00000002")
    assert go_on(other, 5) == go_on(job, 5)


def test_torch_reads_the_folder_as_one_checkpoint(tmp_path, splits):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save  # noqa: TID251

    def work(world):
        job = prepare(recipe_with(SpNgd(lr=0.1)), world, splits)
        go_on(job, 2)
        saved(job, tmp_path)
        return dict(job.model.named_parameters())

    names = run_threads(3, work)[0]
    dcp_to_torch_save(tmp_path / "step-00000002", tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    for name, value in names.items():
        assert torch.equal(whole[f"model/{name}"], value)
    parts = [json.loads((tmp_path / f"step-00000002/rank-{r}/sums.json").read_text()) for r in range(3)]
    assert all("__0_0.distcp" in part for part in parts)
