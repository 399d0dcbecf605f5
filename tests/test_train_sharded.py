"""`natgrad train --shard`: a model that is cut over ranks trains, is judged, saved and taken up as a whole one is."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from in_parts import full, on_threads
from natgrad.parallel import RanksDifferError, World, blocks_of, local_of, run_threads
from natgrad_lab.data import Digits, Regularisation
from natgrad_lab.models import CifarResNet, Mlp, Transformer
from natgrad_lab.train.loop import build, compare_ranks, prepare, steps
from natgrad_lab.train.optimizers import AdamW, Lars, Muon, Nlcg, Seng, Sgd, SpNgd
from natgrad_lab.train.recipe import Recipe
from natgrad_lab.train.resume import check_agreement
from natgrad_lab.train.run import Options, check
from sharded_runs import EXACT, RECIPE, Sharded, train

SAME = {"rtol": 1e-9, "atol": 1e-9}
LAYOUTS = {"one": (1, None), "ddp": (2, None), "fsdp": (2, 1), "fsdp of 4": (4, 1), "hsdp": (4, 2)}


def on(layout, *args, **options):
    """`train` in a layout; of the first rank, after all others were found to agree."""
    ranks, replicas = LAYOUTS[layout]
    if replicas is None:
        results = run_threads(ranks, lambda world: train(world, *args, **options))
    else:
        results = on_threads(ranks, lambda world: train(world, *args, sharded=Sharded(replicas), **options))
    for weights, means, scores, losses, _ in results:
        assert torch.equal(weights, results[0][0])
        assert means is None or torch.equal(means, results[0][1])
        assert (scores, losses) == results[0][2:4]
    return results[0]


def check_same(found, expected, **how):
    assert_close(found[0], expected[0], **(how or SAME))
    if expected[1] is not None:
        assert_close(found[1], expected[1], **(how or SAME))
    assert found[2] == pytest.approx(expected[2], rel=1e-5)
    assert found[3] == pytest.approx(expected[3], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "layout"), [*((name, "fsdp") for name in EXACT), ("spngd", "hsdp"), ("seng", "fsdp of 4")]
)
def test_sharded_ranks_end_where_one_rank_ends(name, layout, splits):
    """Micro-batches, running means of the weights and evaluations in between included."""
    recipe = replace(RECIPE, optimizer=EXACT[name])
    check_same(on(layout, recipe, splits), on("one", recipe, splits))


FEATURES = {
    "uneven shares": {"batch": 33, "micro_batch": 16},
    "batch norm in bfloat16, blended and erased images": {
        "model": CifarResNet(8, (4, 6, 8)),
        "regularisation": Regularisation(mixup=0.4, erase=0.5, per_sample=True),
        "norm_samples": 65,
        "precision": "bfloat16",
    },
    "running statistics": {"model": CifarResNet(8, (4, 6, 8)), "norms": "average", "average": None, "steps": 2},
    "float16": {"model": Mlp((9,)), "precision": "float16"},
    "sampled labels": {"optimizer": SpNgd(lr=0.05, refresh=2, fisher="sampled")},
    "no decay of norms": {"optimizer": Nlcg(lr=0.05, decay_norms=False, weight_decay=1e-3)},
    "half precision on the wire": {"optimizer": SpNgd(lr=0.05, refresh=1, wire="bfloat16")},
}


@pytest.mark.parametrize("name", FEATURES)
def test_features_of_the_trainer_do_what_they_do_on_whole_models(name, splits):
    recipe = replace(RECIPE, **{"optimizer": SpNgd(lr=0.05, refresh=2), **FEATURES[name]})
    check_same(on("fsdp", recipe, splits), on("ddp", recipe, splits), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "spngd"])
def test_runs_are_taken_up_in_any_layout(name, splits, tmp_path):
    """To the last bit in the layout in which they were saved, between others in meaning."""
    recipe = replace(RECIPE, optimizer=EXACT[name])
    expected = on("one", recipe, splits)
    others = {"hsdp": ("fsdp",), "ddp": ("hsdp",)} if name == "spngd" else {}
    for saved_in, loaded_in in {"fsdp": ("fsdp", "one"), **others}.items():
        path = on(saved_in, recipe, splits, folder=tmp_path / saved_in)[4]
        for layout in loaded_in:
            weights, means, *_ = on(layout, recipe, splits, start=path)
            if layout == saved_in:
                whole = on(layout, recipe, splits)
                assert torch.equal(weights, whole[0])
                assert torch.equal(means, whole[1])
            assert_close(weights, expected[0], **SAME)
            assert_close(means, expected[1], **SAME)


def test_blocks_are_cut_by_themselves():
    def names(model):
        known = {module: name for name, module in model.named_modules()}
        return [known[block] for block in blocks_of(model)]

    assert names(Transformer(3, 8, 2).build((5,), 7)) == ["blocks.0", "blocks.1", "blocks.2"]
    assert names(Mlp((4, 4)).build((1, 2, 2), 3)) == []  # lists of layers
    assert len(names(CifarResNet(8, (4, 6, 8)).build((3, 8, 8), 10))) == 3
    shared = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2)) for _ in range(2)), nn.ModuleList([Pair(), Pair()]))
    shared[2][0].first.weight = shared[0][0].weight
    assert names(shared) == ["2.1"]


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)


REFUSED = {
    "one rank": ({}, {"ranks": 1}, "--ranks"),
    "replicas": ({}, {"replicas": 3}, "replicas=3 .* choose of 1, 2"),
    "no shards": ({}, {"replicas": 4}, "choose of 1, 2"),
    "replicas alone": ({}, {"shard": False, "replicas": 2}, "--replicas says nothing without --shard"),
    "optimizer": ({"optimizer": Lars()}, {}, "Lars needs whole layers"),
    "matrices": ({"optimizer": Muon()}, {}, "Muon needs whole layers"),
    "rescale": ({"optimizer": SpNgd(rescale="always")}, {}, "rescale= does not work"),
    "overlap": ({"optimizer": SpNgd(overlap=True)}, {}, r"overlap=True\) does not work"),
    "weights": ({"optimizer": SpNgd(weights_wire="bfloat16")}, {}, r"weights=\) does not work"),
    "replicated": ({"optimizer": Seng(replicated=True)}, {}, r"owners=False\) does not work"),
    "curvature step": ({"optimizer": Nlcg(step="curvature")}, {}, r"CurvatureStep\(\) does not work"),
    "channels last": ({"channels_last": True}, {}, "channels_last=True does not work"),
    "single samples": ({"micro_batch": 1}, {}, "micro_batch=1 does not work"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_is_refused_before_data_are_read(name, tmp_path):
    values, options, words = REFUSED[name]
    recipe = Recipe(Digits(), Mlp((4,)), **{"optimizer": Sgd(), **values})
    chosen = Options(**{"out": str(tmp_path / "run"), "ranks": 4, "shard": True, "device": "cpu", **options})
    with pytest.raises(ValueError, match=words) as told:
        check("mine", recipe, chosen)
    assert "\n" not in str(told.value)


def test_ranks_refuse_what_their_parent_would(splits):
    """Under torchrun nobody has checked; no data are read for it."""

    def work(world):
        with pytest.raises(ValueError, match="rescale= does not work"):
            build(replace(RECIPE, optimizer=SpNgd(rescale="always")), world, torch.device("cpu"), Sharded())
        with pytest.raises(ValueError, match="ranks disagree on shard"):
            check_agreement(RECIPE, world, shard=world.rank == 0, replicas=1)

    on_threads(2, work)


def test_weights_are_those_of_the_seed_on_every_rank(splits):
    def work(world):
        learner = build(RECIPE, world, torch.device("cpu"), Sharded())
        parts = [p.to_local() for p in learner.model.parameters()]
        return full(learner.model), sum(part.numel() for part in parts)

    (first, own), (second, others) = on_threads(2, work)
    alone = build(RECIPE, World(), torch.device("cpu")).model
    assert torch.equal(first, full(alone))
    assert torch.equal(first, second)
    assert own + others == len(first)
    assert max(own, others) < 0.6 * len(first)


def test_ranks_that_drift_are_found_between_replicas(splits):
    """`check=`, with an optimizer that knows nothing of ranks."""

    def work(world):
        learner = build(replace(RECIPE, optimizer=AdamW()), world, torch.device("cpu"), Sharded(2))
        job = prepare(replace(RECIPE, steps=1), world, splits, learner)
        list(steps(job))  # compared after its step, and found alike
        if world.rank == 3:
            local_of(learner.model.head.weight)[0, 0] += 1
        with pytest.raises(RanksDifferError, match=r"head\.weight") as told:
            compare_ranks(job, 1)
        return told.value.ranks

    assert on_threads(4, work, check=1) == [(3,)] * 4
