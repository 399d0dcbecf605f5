"""FSDP2 and HSDP: every optimizer on a model cut over ranks ends where one process ends, and its state moves between
any two layouts.
"""

import contextlib
import copy
import shutil
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist  # noqa: TID251  (what users do)
import torch.distributed.checkpoint as dcp  # noqa: TID251
from torch import nn
from torch.distributed.checkpoint.state_dict import (  # noqa: TID251
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh  # noqa: TID251
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard  # noqa: TID251
from torch.distributed.tensor import DTensor  # noqa: TID251
from torch.distributed.tensor.parallel import (  # noqa: TID251
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import natgrad
from helpers import Mixed, Net, backward
from in_parts import OPTIMIZERS, Uneven, built, full, mesh_of, on_ranks, sharded, train
from natgrad.layers import UncurvedParameter, find_layers
from natgrad.layers.shards import Cut, shard_of
from natgrad_lab.train.checkpoint import name_of
from planned import planner, sent_by_fsdp
from sharded_runs import RUN, command, compiled

pytestmark = pytest.mark.slow
SAME = {"rtol": 1e-9, "atol": 1e-9}
STEPS = 20


def alone(name, steps=STEPS, kind=Uneven):
    """The weights of one process."""
    model = built(kind)
    train(OPTIMIZERS[name](model), model, range(steps), kind=kind)
    return full(model)


def trained(rank, ranks, replicas, names):
    found = {}
    for name in names:
        model = sharded(built(seed=0), mesh_of(ranks, replicas))
        opt = OPTIMIZERS[name](model)
        train(opt, model, range(STEPS), rank, ranks)
        found[name] = full(model)
    return found


FEW = "spngd", "kfac", "nlcg", "seng"


def work_of_two(rank, ranks, folder, of_one):
    """All that two processes are asked, in one go: to start them takes longer than most of it."""
    return {
        "compiled": compiled(ranks) if shutil.which("g++") else None,
        "trained": trained(rank, ranks, 1, tuple(OPTIMIZERS)),
        "travelled": travelled(rank, ranks, 1),
        "moves": moves(rank, ranks, folder, of_one),
        "ways": ways(rank, ranks),
        "policy": lower(rank, ranks, "policy"),
        "model": lower(rank, ranks, "model"),
        "refusals": refusals(rank, ranks),
        "run": command(folder, ranks),
        "passes": sent_by_fsdp(rank, ranks, 1),
    }


def work_of_four(rank, ranks, folder):
    return {
        "run": command(folder, ranks, resume=True),
        "passes": sent_by_fsdp(rank, ranks, 2),
        "trained": trained(rank, ranks, 1, FEW),  # some shards are empty
        "trained by replicas": trained(rank, ranks, 2, FEW),
        "travelled by replicas": travelled(rank, ranks, 2),
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A folder, and what one process has saved there."""
    folder = str(tmp_path_factory.mktemp("sharded"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return folder, save(0, 1, folder, "one")


@pytest.fixture(scope="module")
def two(one):
    folder, saved = one
    return on_ranks(2, work_of_two, folder, saved[2])


@pytest.fixture(scope="module")
def four(one, two):
    folder, _ = one
    last = Path(folder) / "run/checkpoints" / name_of(RUN.steps)
    last.rename(last.with_suffix(".gone"))  # four ranks go on from the middle of two ranks' run
    return on_ranks(4, work_of_four, folder)


@pytest.mark.parametrize(("ranks", "work"), [("two", "trained"), ("four", "trained"), ("four", "trained by replicas")])
def test_sharded_models_train_as_one_process(ranks, work, request):
    results = [found[work] for found in request.getfixturevalue(ranks)]
    for name in results[0]:
        expected = alone(name)
        for found in results:
            assert_close(found[name], expected, **SAME)


def test_runs_of_the_trainer_end_as_on_one_process(two, four, tmp_path):
    """`natgrad train --shard`: two ranks, and as 2 x 2 from their checkpoint on."""
    expected = command(str(tmp_path), 1)
    for found in (*two, *four):
        assert_close(found["run"], expected, **SAME)


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_compiled_runs_end_as_eager_ones(two):
    """`natgrad train --shard --compile`: steps that do not measure, and evaluations, run in graphs."""
    for found in two:
        (expected, none), (results, graphs) = found["compiled"]
        assert (none, graphs > 0) == (0, True)
        for result, value in zip(results, expected):
            assert_close(result, value, **SAME)


@pytest.mark.parametrize(("ranks", "replicas"), [("two", 1), ("four", 2)])
def test_plans_know_what_fsdp_sends(ranks, replicas, request):
    results = request.getfixturevalue(ranks)
    planned = planner(replicas=replicas).passing(len(results))
    for found in results:
        assert found["passes"] == [*planned.forward, *planned.backward]
    assert {m.how for m in planned.forward} == {"all_gather"}
    averages = {"reduce_scatter"} if replicas == 1 else {"reduce_scatter", "all_reduce"}
    assert {m.how for m in planned.backward} == {"all_gather"} | averages


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_parts_of_layers_are_the_parts_of_their_parameters(ranks):
    """Rows of W cut as the parameters are give the same numbers as the cut parameters."""
    for found in find_layers(built()):
        layer = found.layer
        cut = Cut(layer)
        matrix = layer.pack([p.detach() for p in layer.parameters]).contiguous()
        rows = -(-cut.form[1] // ranks)
        for rank in range(ranks):
            start, stop = (min(k * rows, cut.form[1]) for k in (rank, rank + 1))
            parts = [nn.Parameter(p.detach()[start:stop].clone()) for p in layer.parameters]
            shard = shard_of(layer, cut, parts, start, stop)
            piece = matrix.view(cut.form)[:, start:stop].contiguous()
            assert piece.shape == shard.shape
            assert isinstance(shard, UncurvedParameter) == isinstance(layer, UncurvedParameter)
            for part, view in zip(parts, shard.unpack(piece)):
                assert torch.equal(view, part)
            assert torch.equal(shard.pack([p.detach() for p in parts]), piece)


# --- what travels, and who holds what ---


@contextlib.contextmanager
def counted(calls):
    """Count collectives; sharded tensors may not be gathered, nor be handed to foreach operations."""
    names = (
        "all_to_all_single",
        "all_reduce",
        "all_gather",
        "all_gather_into_tensor",
        "all_gather_single",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_tensor",
        "reduce_scatter_single",
        "broadcast",
        "batch_isend_irecv",
    )
    foreach = [name for name in dir(torch) if name.startswith("_foreach_")]

    def counting(name, send):
        def call(*args, **options):
            calls[name] = calls.get(name, 0) + 1
            return send(*args, **options)

        return call

    def refusing(act):
        def call(*args, **options):
            lists = [a for a in args if isinstance(a, (list, tuple))]
            assert not any(isinstance(t, DTensor) for some in lists for t in some), act
            return act(*args, **options)

        return call

    def never(*args, **options):
        raise AssertionError("a sharded tensor is gathered")

    with contextlib.ExitStack() as stack:
        for name in names:
            if hasattr(dist, name):
                stack.enter_context(mock.patch.object(dist, name, counting(name, getattr(dist, name))))
        for name in foreach:
            stack.enter_context(mock.patch.object(torch, name, refusing(getattr(torch, name))))
        for name in ("full_tensor", "redistribute"):
            stack.enter_context(mock.patch.object(DTensor, name, never))
        yield


def travelled(rank, ranks, replicas):
    model = sharded(built(), mesh_of(ranks, replicas))
    opt = OPTIMIZERS["spngd"](model)
    numel = sum(p.numel() for p in model.parameters())
    told = []
    for k in range(4):
        backward(model, tuple(t.chunk(ranks)[rank] for t in Uneven.batch(24, k)))
        calls = {}
        with counted(calls):
            opt.step()
        opt.zero_grad()
        told.append((opt.refreshed, calls, opt.traffic()))
    sizes, factors, vectors = {}, {}, []
    for name, parameter in model.named_parameters():
        for key, value in opt.state[parameter].items():
            if isinstance(value, DTensor):
                sizes[f"{name}.{key}"] = value.to_local().numel()
                vectors.append(key)
            elif value.dim() > 1:
                factors[f"{name}.{key}"] = value.numel()
    return told, numel, sizes, factors, sorted(set(vectors)), {c.name: c.owner for c in opt.cells}


@pytest.mark.parametrize(("ranks", "work", "replicas"), [("two", "travelled", 1), ("four", "travelled by replicas", 2)])
def test_two_messages_and_no_gathering(ranks, work, replicas, request):
    results = [found[work] for found in request.getfixturevalue(ranks)]
    shards = len(results) // replicas
    for told, numel, *_ in results:
        for share, calls, traffic in told:
            assert calls.pop("all_to_all_single") == 2
            if share == 0:
                assert set(calls) == {"all_reduce"}
                assert set(traffic) == {"scalars", "gradients", "directions"}
                bytes_of = 8 * numel
                assert traffic["gradients"] <= bytes_of
                assert traffic["directions"] <= replicas * bytes_of
        assert [share > 0 for share, *_ in told] == [True, False, False, True]
    # every vector lies in parts: all shards together once a replica
    for key in results[0][2]:
        assert sum(found[2][key] for found in results) % replicas == 0
        assert len({found[2][key] for found in results[:shards]}) <= 2
    assert {"momentum", "gradients", "adam_first", "adam_second"} <= set(results[0][4])
    held = [set(found[3]) for found in results]
    assert all(not a & b for k, a in enumerate(held) for b in held[:k])  # factors at their owners alone
    assert all(held)


# --- checkpoints ---

SAVED, LATER = range(4), range(4, 7)


def leaf(model, mesh):
    return sharded(model, mesh, leaves=("conv", "norm"))


def layout(name, ranks):
    """A model of Mixed in a layout, and the model whose passes are run."""
    model = built(Mixed, seed=0)
    if name == "ddp":
        return model, nn.parallel.DistributedDataParallel(model)
    if name == "one":
        return model, model
    model = leaf(model, mesh_of(ranks, 2) if name == "hsdp" else mesh_of(ranks))
    return model, model


def written(opt, model):
    """What is in the whole state, by the names of parameters."""
    names = [n for n, _ in model.named_parameters()]
    whole_state = opt.gather_state_dict()["state"]
    return {f"{names[k]}.{key}": value.clone() for k, own in whole_state.items() for key, value in own.items()}


def save(rank, ranks, folder, kind):
    """Train in a layout, save, and go on: the whole state and weights that were saved, and the weights after."""
    model, wrapped = layout(kind, ranks)
    opt = OPTIMIZERS["spngd"](model)
    train(opt, wrapped, SAVED, rank, ranks, Mixed)
    parts = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, opt)}
    dcp.save(parts, checkpoint_id=f"{folder}/{kind}")
    saved = written(opt, model), full(model), opt.gather_state_dict()
    train(opt, wrapped, LATER, rank, ranks, Mixed)
    return *saved, full(model)


def load(rank, ranks, folder, before, kind, gathered=None):
    """The state and weights that come back in a layout, and the weights after going on."""
    model, wrapped = layout(kind, ranks)
    opt = OPTIMIZERS["spngd"](model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    parts = {"model": get_model_state_dict(model)}
    if gathered is None:
        parts["optimizer"] = get_optimizer_state_dict(model, opt)
    dcp.load(parts, checkpoint_id=f"{folder}/{before}")
    set_model_state_dict(model, parts["model"])
    if gathered is None:
        set_optimizer_state_dict(model, opt, parts["optimizer"])
    else:
        opt.load_state_dict(copy.deepcopy(gathered))
    found = written(opt, model), full(model)
    train(opt, wrapped, LATER, rank, ranks, Mixed)
    return *found, full(model)


def moves(rank, ranks, folder, of_one):
    """What is saved in two layouts, and what comes back by (saved in, loaded in, how)."""
    warnings.simplefilter("ignore")  # of this process, which is ours
    saved = {kind: save(rank, ranks, folder, kind) for kind in ("fsdp", "ddp")}
    found = {
        (before, kind, "parts"): load(rank, ranks, folder, before, kind)
        for before, kind in (("one", "fsdp"), ("fsdp", "hsdp"), ("fsdp", "ddp"), ("ddp", "fsdp"))
    }
    for before, kind in (("one", "fsdp"), ("ddp", "hsdp"), ("fsdp", "ddp")):
        whole_state = of_one if before == "one" else saved[before][2]
        found[before, kind, "whole"] = load(rank, ranks, folder, before, kind, whole_state)
    return saved, found


@pytest.mark.filterwarnings("ignore::natgrad.NatgradWarning", "ignore:torch.distributed is disabled")
def test_checkpoints_move_between_layouts(one, two):
    """torch.distributed.checkpoint and the gathered state: curvature, vectors, numbers and weights are the same."""
    (folder, of_one), (saved, found) = one, two[0]["moves"]
    saved, found = {**saved, "one": of_one}, dict(found)
    for before in ("fsdp", "ddp"):
        found[before, "one", "parts"] = load(0, 1, folder, before, "one")
        found[before, "one", "whole"] = load(0, 1, folder, before, "one", saved[before][2])
    for (before, *how), (state, weights, later) in found.items():
        expected, at, _, after = saved[before]
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(state[key], value), (before, how, key)
        assert torch.equal(weights, at)
        assert_close(later, after, **SAME)


# --- ways of training ---


class Deep(nn.Module):
    """Blocks of which one is computed again in the backward pass, and a layer whose module nobody calls."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.norm = nn.LayerNorm(6)
        self.odd = nn.Linear(6, 6)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        hidden = checkpoint(lambda h: torch.tanh(self.second(self.norm(h))), hidden, use_reentrant=False)
        return self.head(hidden + nn.functional.linear(hidden, self.odd.weight, self.odd.bias))  # without calling it

    @staticmethod
    def batch(n, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(n, 4, generator=generator, dtype=torch.float64), torch.randint(3, (n,), generator=generator)


def ways(rank, ranks):
    found = {}
    mesh = mesh_of(ranks)
    # micro-batches whose gradients FSDP keeps until the last one, layers computed again, a module never called
    model = sharded(built(Deep), mesh, leaves=("first", "second"))
    opt = OPTIMIZERS["spngd"](model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for k in range(6):
            x, y = (t.chunk(ranks)[rank] for t in Deep.batch(24, k))
            for part in range(2):
                if k % 2:
                    model.set_requires_gradient_sync(part == 1)
                loss = nn.functional.cross_entropy(model(x.chunk(2)[part]), y.chunk(2)[part])
                (loss / 2).backward()
            opt.step()
            opt.zero_grad()
    found["parts"] = full(model), [str(w.message) for w in told], opt.engine.dropped
    # clipping, and a frozen part that is unfrozen later
    model = sharded(built(), mesh)
    model.hidden.requires_grad_(False)
    opt = OPTIMIZERS["spngd"](model, max_norm=0.1)
    train(opt, model, range(3), rank, ranks)
    model.hidden.requires_grad_(True)
    train(opt, model, range(3, 6), rank, ranks)
    found["thawed"] = full(model)
    # labels drawn from the model: one more backward pass through what FSDP gathers
    model = sharded(built(), mesh)
    opt = natgrad.SPNGD(model, lr=0.1, damping=0.03, refresh=2, fisher="sampled")
    losses = []
    for _ in range(10):
        x, y = (t.chunk(ranks)[rank] for t in Uneven.batch(24, 0))
        output = model(x)
        loss = nn.functional.cross_entropy(output, y)
        opt.sample(output)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(float(loss.detach()))
    found["sampled"] = losses, opt.engine.dropped, opt.coverage().share, opt.preconditioned.layers
    return found


@pytest.mark.filterwarnings("ignore::natgrad.NatgradWarning")
def test_ways_of_training(two):
    found, other = (each["ways"] for each in two)
    model = built(Deep)
    opt = OPTIMIZERS["spngd"](model)
    for k in range(6):
        backward(model, Deep.batch(24, k))
        opt.step()
        opt.zero_grad()
    weights, told, dropped = found["parts"]
    assert_close(weights, full(model), **SAME)
    assert torch.equal(weights, other["parts"][0])
    assert told == []
    assert dropped == 0
    model = built()
    model.hidden.requires_grad_(False)
    opt = OPTIMIZERS["spngd"](model, max_norm=0.1)
    train(opt, model, range(3))
    model.hidden.requires_grad_(True)
    train(opt, model, range(3, 6))
    assert_close(found["thawed"], full(model), **SAME)
    losses, dropped, share, layers = found["sampled"]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert dropped == 0
    assert share > 0.9
    assert layers == 11


def lower(rank, ranks, kind):
    """Single precision with passes in bfloat16, or a model in bfloat16: losses, layers that lost their curvature."""
    model = built().float() if kind == "policy" else built().bfloat16()
    if kind == "policy":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        model = sharded(model, mesh_of(ranks), mp_policy=policy)
    else:
        model = sharded(model, mesh_of(ranks))
    opt = natgrad.SPNGD(model, lr=0.1, damping=0.03, refresh=3)
    losses = []
    for _ in range(12):
        x, y = (t.chunk(ranks)[rank] for t in Uneven.batch(24, 0))
        loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(float(loss.detach()))
    dtypes = {str(v.dtype) for s in opt.state.values() for k, v in s.items() if k in ("momentum", "master")}
    return losses, opt.coverage().share, opt.engine.dropped, opt.skipped, dtypes, full(model).float()


@pytest.mark.parametrize("kind", ["policy", "model"])
def test_half_precision(kind, two):
    first, second = (found[kind] for found in two)
    for losses, share, dropped, skipped, dtypes, weights in (first, second):
        assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
        assert share > 0.9
        assert dropped == skipped == 0
        assert dtypes == {"torch.float32"}
        assert torch.equal(weights, first[-1])


# --- what is refused ---


def refused(act):
    try:
        act()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def refusals(rank, ranks):
    mesh, told = mesh_of(ranks), {}
    model = built()
    opt = OPTIMIZERS["spngd"](model)
    sharded(model, mesh)

    def later():
        backward(model, tuple(t.chunk(ranks)[rank] for t in Uneven.batch(24, 0)))
        opt.step()

    told["since"] = refused(later)
    told["since, rebuilt"] = refused(opt.rebuild)
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    made = parallelize_module(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), mesh, plan)
    told["tensor parallel"] = refused(lambda: natgrad.SPNGD(made, lr=0.1))
    stage = nn.Linear(4, 5 + rank)
    told["pipeline"] = refused(lambda: natgrad.SPNGD(stage, lr=0.1))
    half = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    fully_shard(half[0], mesh=mesh)
    told["half"] = refused(lambda: natgrad.SPNGD(half, lr=0.1))
    offloaded = fully_shard(built(Net), mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    told["offload"] = refused(lambda: natgrad.SPNGD(offloaded, lr=0.1))
    other = sharded(built(), mesh)
    told["world"] = refused(lambda: natgrad.SPNGD(other, lr=0.1, world=natgrad.World.alone()))
    for name, options in {
        "rescale": {"rescale": "always"},
        "owners": {"world": natgrad.World(owners=False)},
        "overlap": {"world": natgrad.World(overlap=True)},
        "length": {"length": lambda segments, world: [1.0] * len(segments)},
    }.items():
        told[name] = refused(lambda options=options: natgrad.SPNGD(other, lr=0.1, **options))
    told["curvature step"] = refused(lambda: natgrad.NLCG(other, step=natgrad.CurvatureStep()))
    told["preconditioner"] = refused(lambda: natgrad.Preconditioner(other))
    averaged = natgrad.World(gradients="averaged")  # as FSDP does: no reason to do without owners
    told["averaged"] = refused(lambda: natgrad.SPNGD(other, lr=0.1, world=averaged))
    second = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("dp", "tp"))
    both = parallelize_module(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), second["tp"], plan)
    fully_shard(both, mesh=second["dp"])
    told["both"] = refused(lambda: natgrad.SPNGD(both, lr=0.1))
    return told


def test_refusals_say_what_to_do(two):
    for told in (found["refusals"] for found in two):
        for name, words in {
            "since": ("fully_shard", "build the optimizer after"),
            "since, rebuilt": ("fully_shard", "build the optimizer after"),
            "tensor parallel": ("0.weight", "tensor parallelism"),
            "both": ("0.weight", "tensor parallelism"),
            "pipeline": ("pipeline", "world=World("),
            "half": ("1.weight", "fully_shard(model)"),
            "offload": ("CPU offload", "offload_policy"),
            "world": ("world=World(",),
            "rescale": ("rescale",),
            "owners": ("owners=False",),
            "overlap": ("overlap=True",),
            "length": ("of your own",),
            "curvature step": ("CurvatureStep",),
            "preconditioner": ("Preconditioner",),
            "averaged": ("nothing was refused",),
        }.items():
            assert all(word in told[name] for word in words), (name, told[name])
            assert "\n" not in told[name]
