"""Models that fully_shard has cut and that are moved afterwards, policies, what is refused: ranks are threads."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard  # noqa: TID251
from torch.testing import assert_close

import natgrad
from in_parts import OPTIMIZERS, Uneven, built, full, mesh_of, on_threads, sharded, train
from natgrad.parallel import World

SAME = {"rtol": 1e-9, "atol": 1e-9}
MOVES = {
    "to a type before construction": ("before", lambda model: model.double()),
    "to a type after construction": ("after", lambda model: model.to(torch.float64)),
    "to its own device after steps": ("later", lambda model: model.to("cpu")),
    "to other memory after steps": ("later", lambda model: model._apply(torch.clone)),
}


@pytest.mark.parametrize(("name", "ranks", "replicas"), [("spngd", 2, 1), ("nlcg", 2, 1), ("seng", 4, 2)])
def test_an_optimizer_follows_a_sharded_model_that_is_moved(name, ranks, replicas):
    start = built().float()

    def work(world, ranks, when, move):
        model = copy.deepcopy(start if when != "later" else start.double())
        if ranks > 1:
            sharded(model, mesh_of(ranks, replicas))
        if when == "before":
            move(model)
        optimizer = OPTIMIZERS[name](model, world=world)
        if when == "after":
            move(model)
        train(optimizer, model, range(2), world.rank, ranks)
        if when == "later":
            move(model)
        train(optimizer, model, range(2, 4), world.rank, ranks)
        kinds = {v.dtype for state in optimizer.state.values() for v in state.values() if v.is_floating_point()}
        return full(model), kinds

    def all_moves(world, ranks):
        return [work(world, ranks, *how) for how in MOVES.values()]

    expected = all_moves(World(), 1)
    for results in on_threads(ranks, all_moves, ranks):
        for (found, kinds), (weights, known) in zip(results, expected):
            assert_close(found, weights, **SAME)
            assert found.dtype == torch.float64
            assert kinds == known


POLICIES = {
    "gradients travel in bfloat16": {"param_dtype": torch.bfloat16},
    "gradients travel in float32": {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32},
    "averages in float64": {"reduce_dtype": torch.float64},
}


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_keeps_curvature_and_single_precision(name):
    """Passes are in half precision; statistics, momentum and weights are not, and no layer loses its curvature."""
    start = built().float()

    def work(world):
        model = sharded(copy.deepcopy(start), mesh_of(2), mp_policy=MixedPrecisionPolicy(**POLICIES[name]))
        optimizer = natgrad.SPNGD(model, lr=0.05, damping=0.03, refresh=3, world=world)
        x, y = (t.chunk(2)[world.rank] for t in Uneven.batch(24, 0))
        losses = []
        for _ in range(9):
            loss = nn.functional.cross_entropy(model(x).float(), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        world.mean(losses)
        kinds = {k: v.dtype for state in optimizer.state.values() for k, v in state.items() if v.is_floating_point()}
        kinds |= {f"gradient and weight of {n}": p.dtype for n, p in model.named_parameters()}
        return [float(loss) for loss in losses], optimizer, full(model), kinds

    first, second = on_threads(2, work)
    assert torch.equal(first[2], second[2])
    for losses, optimizer, _, kinds in (first, second):
        assert losses[-1] < 0.9 * losses[0]
        assert optimizer.engine.dropped == optimizer.skipped == 0
        assert optimizer.coverage().share > 0.9
        single = {k: v for k, v in kinds.items() if v == torch.float32}
        assert {"momentum", "A", "G_inverse", "gradient and weight of embed.weight"} <= single.keys()
        assert torch.bfloat16 not in {v for k, v in kinds.items() if not k.endswith("_before")}


def test_offloaded_blocks_are_refused_by_name():
    def work(world):
        model, mesh = built(), mesh_of(2)
        fully_shard(model.hidden, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
        fully_shard(model, mesh=mesh)
        with pytest.raises(ValueError, match="hidden was given a CPUOffloadPolicy: CPU offload is not supported"):
            natgrad.SPNGD(model, lr=0.1, world=world)
        with pytest.raises(ValueError, match="leave offload_policy out"):
            natgrad.NLCG(model, lr=0.1, world=world)

    on_threads(2, work)


def test_models_without_values_are_cut_too():
    """On the meta device, as a planner builds them: nothing is offloaded there."""

    def work(world):
        with torch.device("meta"):
            model = built()
        assert {p.device.type for p in sharded(model, mesh_of(2)).parameters()} == {"meta"}
        return natgrad.parallel.sharding_of(model, world).shards

    assert on_threads(2, work) == [2, 2]
