"""Checkpoints: a run goes on as if nothing had happened, on its ranks to the last bit, on others in meaning."""

import json
import pickle
import resource
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from natgrad.data import Digits, Regularisation
from natgrad.models import CifarResNet, Mlp
from natgrad.parallel import World, run_threads
from natgrad.schedules import Exponential
from natgrad.train import checkpoint
from natgrad.train.loop import prepare, steps
from natgrad.train.optimizers import AdamW, KFac, Nlcg, Seng, Sgd, SpNgd
from natgrad.train.recipe import Recipe
from natgrad.train.saver import Saver
from natgrad.train.state import restore

CONV = Recipe(
    Digits(),
    CifarResNet(8, (4, 6, 8)),
    Sgd(),
    regularisation=Regularisation(mixup=0.4, erase=0.5, per_sample=True),
    average=0.9,
    batch=60,
    micro_batch=20,
    steps=9,
    evaluate_every=2,
    norm_samples=64,
)
SETTINGS = [
    Sgd(lr=0.1, nesterov=True, weight_decay=1e-3),
    AdamW(),
    SpNgd(lr=0.05, refresh=None, decay=0.5, rescale="always", coefficient="tied", displaced=True),
    SpNgd(lr=0.05, weights_wire="bfloat16", samples=None),
    KFac(lr=0.05, refresh=2, inverse="eigen", gather="directions"),
    Seng(lr=0.1, refresh=3, samples=40),
    Seng(lr=0.1, refresh=3, samples=40, replicated=True, legacy=True, legacy_local=True),
    Nlcg(lr=0.1),
    Nlcg(lr=1.0, preconditioner="kronecker", step="curvature", beta="polak_ribiere"),
]
NAMES = ["sgd", "adamw", "spngd", "spngd-bf16", "kfac", "seng", "seng-local", "nlcg", "nlcg-kfac"]


@pytest.fixture(scope="module")
def splits():
    return Digits().load()


def recipe_with(optimizer):
    damped = hasattr(optimizer, "damping") and not isinstance(optimizer, Nlcg)
    return replace(CONV, optimizer=optimizer, **({"damping_schedule": Exponential(0.5, 0.5)} if damped else {}))


def go_on(job, until):
    """Take steps, judging as a run does; return their losses."""
    losses = []
    for step in steps(job):
        losses.append(step.loss)
        if job.due(step.step):
            job.score()
        if step.step == until:
            break
    return losses


def saved(job, folder, tell=lambda *_, **__: None):
    saver = Saver(folder, job.world, keep=2, tell=tell)
    job.world.sum([torch.zeros(1)])  # nobody writes before rank 0 has cleared up
    saver.save(job)
    saver.finish()
    return folder / checkpoint.name_of(job.done)


def weights(job):
    return [p.detach().clone() for p in job.model.parameters()]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("optimizer", SETTINGS, ids=NAMES)
def test_a_resumed_run_is_the_same_run_to_the_last_bit(tmp_path, splits, optimizer, ranks):
    recipe = recipe_with(optimizer)

    def straight(world):
        job = prepare(recipe, world, splits)
        first = go_on(job, 5)
        saved(job, tmp_path)
        return first + go_on(job, 9), weights(job), [m.clone() for m in job.average.means], job.score()

    def taken_up(world):
        torch.manual_seed(99)
        job = prepare(recipe, world, splits)
        restore(job, tmp_path / "step-00000005")
        assert job.done == 5
        return go_on(job, 9), weights(job), job.average.means, job.score()

    for a, b in zip(run_threads(ranks, straight), run_threads(ranks, taken_up)):
        assert a[0][5:] == b[0]
        assert all(torch.equal(x, y) for x, y in zip(a[1], b[1]))
        assert all(torch.equal(x, y) for x, y in zip(a[2], b[2]))
        assert a[3] == b[3]


CURVED = [SETTINGS[k] for k in (2, 4, 5, 7, 8)]


@pytest.mark.parametrize("optimizer", CURVED, ids=[NAMES[k] for k in (2, 4, 5, 7, 8)])
def test_curvature_moves_from_4_ranks_to_2_to_3(tmp_path, splits, optimizer):
    """The state is equal before and after, nothing is measured anew, and the run goes on."""
    recipe = replace(recipe_with(optimizer), steps=40)

    def begin(world):
        job = prepare(recipe, world, splits)
        go_on(job, 3)
        saved(job, tmp_path)
        return job.optimizer.gather_state_dict(), job.optimizer.intervals(), weights(job)

    def move(step):
        def work(world):
            job = prepare(recipe, world, splits)
            restore(job, tmp_path / checkpoint.name_of(step))
            before = job.optimizer.gather_state_dict(), job.optimizer.intervals(), weights(job)
            losses = go_on(job, step + 3)
            saved(job, tmp_path)
            after = job.optimizer.gather_state_dict(), job.optimizer.intervals(), weights(job)
            return before, after, losses

        return work

    state = run_threads(4, begin)[0]
    for ranks, step in ((2, 3), (3, 6)):
        results = run_threads(ranks, move(step))
        for before, _, losses in results:
            assert_same(before, state)
            assert all(0 < loss < 10 for loss in losses)
        state = results[0][1]


def assert_same(one, other):
    assert one[1] == other[1]
    assert all(torch.equal(p, q) for p, q in zip(one[2], other[2]))
    for k, values in other[0]["state"].items():
        assert one[0]["state"][k].keys() == values.keys()
        for key, value in values.items():
            assert torch.equal(one[0]["state"][k][key], value), key
    assert one[0]["param_groups"] == other[0]["param_groups"]


def test_a_run_means_the_same_on_other_ranks(tmp_path, splits):
    """Mixup's partners, gradients and statistics of 4 ranks on 2 and 3: the weights of the undisturbed run."""
    recipe = replace(
        CONV, model=Mlp((12,)), optimizer=SpNgd(lr=0.05, samples=None, refresh=2), micro_batch=None, steps=8
    )
    recipe = replace(
        recipe, regularisation=Regularisation(mixup=0.4)
    )  # one share for all: drawn per rank, so set equal

    def straight(world):
        job = prepare(recipe, world, splits)
        same_shares(job)
        go_on(job, 4)
        saved(job, tmp_path)
        go_on(job, 8)
        return weights(job)

    def taken_up(world):
        job = prepare(recipe, world, splits)
        same_shares(job)
        restore(job, tmp_path / "step-00000004")
        go_on(job, 8)
        return weights(job)

    expected = run_threads(4, straight)[0]
    for ranks in (1, 2, 3):
        for found in run_threads(ranks, taken_up):
            assert_close(found, expected, rtol=1e-3, atol=2e-5)


def same_shares(job):
    for part in range(2):
        job.regulariser.mixups[part].draw = lambda count, generator: torch.full((count,), 0.3, dtype=torch.float64)


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
    assert (kind, values["reason"]) == ("not_saved", "File too large")
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
