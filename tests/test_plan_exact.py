"""Bytes on the wire and in memory: what a plan says is what ranks really send and hold."""

import pytest
import torch

from natgrad.parallel.transport import Alone
from natgrad.sampling import Sampler
from natgrad_lab.models.imagenet import ImageResNet
from natgrad_lab.plan.rehearsal import quota
from natgrad_lab.plan.simulated import SimulatedTransport
from natgrad_lab.train.optimizers import Seng, SpNgd
from planned import BATCH, SETTINGS, planner, real


@pytest.fixture(scope="module")
def small():
    return planner()


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_plan_sends_and_holds_what_ranks_do(name, ranks, small):
    results = real(SETTINGS[name], ranks)
    account = small.account(SETTINGS[name], ranks, BATCH)
    messages, sent = account.sent(fresh=True)
    (told, heard), *_ = results[0]  # the rehearsal is of the first rank
    assert sent == told
    assert messages == heard
    assert account.memory()["state"] == [held for _, held, _ in results]
    assert (ranks == 1) == (told == {}) == (messages == [])


CUT = [
    ("adamw", 2, 1),
    ("spngd adaptive", 2, 1),
    ("kfac", 4, 2),
    ("seng network", 4, 1),
    ("seng", 2, 1),
    ("nlcg", 4, 2),
]


@pytest.mark.parametrize(("name", "ranks", "replicas"), CUT)
def test_a_plan_of_cut_models_sends_and_holds_what_ranks_do(name, ranks, replicas):
    """natgrad's messages; those of FSDP are heard on processes, in test_sharded.py."""
    results = real(SETTINGS[name], ranks, replicas=replicas)
    account = planner(replicas=replicas).account(SETTINGS[name], ranks, BATCH)
    passes = [*account.passing.forward, *account.passing.backward]
    messages, sent = account.sent(fresh=True)
    (told, heard), *_ = results[0]
    assert messages == [*passes, *heard]
    by_fsdp = {kind: sum(m.payload for m in passes if m.kind == kind) for kind in ("parameters", "averages")}
    assert sent == {**by_fsdp, **told}
    curved = name not in ("adamw", "nlcg")
    assert [m.kind for m in heard if m.how == "all_to_all"] == ["gradients", "directions"] * curved
    memory = account.memory()
    assert memory["state"] == [held for _, held, _ in results]
    whole = planner().account(SETTINGS[name], ranks, BATCH).memory()
    assert memory["gradients"] < 0.6 * whole["gradients"]
    assert memory["weights"] < 0.6 * whole["weights"]
    assert max(account.rehearsal.sharding.ranks) == list(range(ranks - ranks // replicas, ranks))


@pytest.mark.parametrize("ranks", [2, 3])
def test_owners_are_those_of_training(ranks, small):
    *_, placed = real(SETTINGS["spngd"], ranks)[0]
    cells = small.account(SETTINGS["spngd"], ranks, 6 * ranks).cells
    assert [(c.name, c.owner, dict(c.holders)) for c in cells] == placed


def test_a_step_in_which_nothing_is_measured_sends_gradients_and_weights_alone(small):
    sent = small.account(SpNgd(refresh=2), 2, BATCH).sent(fresh=False)[1]
    assert sent == real(SpNgd(refresh=2), 2)[0][0][0]  # of two steps the second measures nothing
    assert set(sent) == {"gradients", "weights", "scalars"}


def test_an_all_fresh_step_of_a_resnet50_sends_the_papers_bytes():
    """Spec section 7: 615.8 MB as full squares in single precision, 308.2 MB as triangles."""
    big = planner(ImageResNet(50), (3, 224, 224), 1000, "v100-ib")
    account = big.account(SpNgd(rows_per_dim=None, refresh=1), 107, 2 * 107)
    messages, sent = account.sent(fresh=True)
    assert sent["statistics"] / 1e6 == pytest.approx(308.2, abs=0.05)
    assert 4 * account.numbers() / 1e6 == pytest.approx(615.8, abs=0.05)
    assert sent["gradients"] == sent["weights"] == 4 * 25_557_032
    half = big.account(SpNgd(rows_per_dim=None, refresh=1, wire="float16"), 107, 2 * 107).sent(fresh=True)[1]
    assert half["statistics"] * 2 == sent["statistics"]
    assert {m.how for m in messages} == {"all_reduce", "reduce_scatter", "all_gather", "exchange"}


def test_every_rank_of_a_large_world_holds_its_part():
    """Of ResNet-50 on 1,024 ranks most hold nothing but clocks, and all together what one rank would hold."""
    big = planner(ImageResNet(50), (3, 224, 224), 1000, "v100-ib")
    one = big.account(SpNgd(refresh=1), 1, 2).memory()["state"]
    many = big.account(SpNgd(refresh=1), 1024, 1024).memory()["state"]
    clocks = min(many)
    assert len(many) == 1024
    assert many.count(clocks) > 800
    assert sum(held - clocks for held in many) == pytest.approx(one[0] - clocks, rel=1e-3)


@pytest.mark.parametrize("samples", [1, 7, 32, 256])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_ranks_rows_are_those_that_sampling_leaves_it(samples, ranks):
    for rank in range(ranks):
        sampler = Sampler(0, 0, rank, 1 / ranks)
        drawn = sampler.draw(0, 0, torch.device("cpu"))(10_000, samples)
        assert drawn is not None
        assert quota(samples, rank, ranks) == min(sampler.quota(samples), len(drawn))


def test_rows_that_exceed_the_budget_are_fewer(small):
    rich, poor = (small.account(Seng(refresh=1, budget=b), 2, BATCH) for b in (2**30, 2**18))
    assert max(poor.memory()["state"]) < 0.7 * max(rich.memory()["state"])
    assert max(poor.memory()["state"]) == max(held for _, held, _ in real(Seng(refresh=1, budget=2**18), 2))


def test_simulated_ranks_are_a_transport():
    """The world that an optimizer is built on asks no more of the others than this."""
    calls = {name for name in vars(Alone) if not name.startswith("_")} - {"rank", "size"}
    assert calls <= set(vars(SimulatedTransport))
