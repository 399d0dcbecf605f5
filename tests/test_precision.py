"""Half precision, channels last and compiled networks: the same training, as far as rounding goes."""

import copy
import gc
import itertools
import math
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from natgrad import capture
from natgrad.parallel import World, run_threads
from natgrad_lab.data import Digits
from natgrad_lab.models import CifarResNet, Mlp
from natgrad_lab.train import loop, precision
from natgrad_lab.train.loop import prepare, steps
from natgrad_lab.train.optimizers import AdamW, KFac, Nlcg, Seng, Sgd, SpNgd
from natgrad_lab.train.recipe import Recipe

NET = CifarResNet(8, (4, 8, 8))
RECIPE = Recipe(Digits(), NET, Sgd(lr=0.1, nesterov=True), batch=240, steps=12, seed=3)
# a damping of 1e-3: at the default of 3e-4 inverses make visible what another order of sums leaves in single precision
OPTIMIZERS = [
    Sgd(lr=0.1, nesterov=True),
    AdamW(),
    SpNgd(lr=0.1, damping=1e-3),
    KFac(lr=0.1, damping=1e-3, refresh=2),
    Seng(lr=0.2, refresh=2),
    Nlcg(lr=0.3),
    Nlcg(lr=1.0, step="curvature"),
]
NAMES = ["sgd", "adamw", "spngd", "kfac", "seng", "nlcg", "nlcg curvature"]


def weights(job):
    return torch.cat([parameter.detach().flatten() for parameter in job.model.parameters()])


def trained(recipe, world, splits):
    job = prepare(recipe, world, splits)
    return job, list(steps(job))


def convolution_types(model):
    """The types of what convolutions give, as they come."""
    seen = set()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, i, output: seen.add(output.dtype))
    return seen


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=NAMES)
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_every_optimizer_learns_in_half_precision(splits, optimizer, kind):
    job = prepare(replace(RECIPE, optimizer=optimizer, precision=kind), World(), splits)
    seen = convolution_types(job.model)
    losses = [record.loss for record in steps(job)]
    assert losses[-1] < 0.75 * losses[0]
    expected = {getattr(torch, kind)}
    whole = isinstance(optimizer, Nlcg) and optimizer.looks_again
    assert seen == expected | ({torch.float32} if whole else set())  # its probe lives on small differences
    assert {p.dtype for p in job.model.parameters()} == {torch.float32}
    seen.clear()
    assert job.score().accuracy > 0.3
    assert seen == expected


@pytest.mark.parametrize("optimizer", [Sgd(lr=0.1), SpNgd(lr=0.1, rows_per_dim=None, refresh=1)], ids=["sgd", "spngd"])
def test_a_scaled_loss_is_the_step_of_the_plain_one(splits, optimizer, monkeypatch):
    """In float32 behind the scaler: the scale enters no gradient and no statistic."""
    plain, _ = trained(replace(RECIPE, optimizer=optimizer, steps=5), World(), splits)
    monkeypatch.setitem(precision.KINDS, "float16", None)
    scaled, _ = trained(replace(RECIPE, optimizer=optimizer, steps=5, precision="float16"), World(), splits)
    assert scaled.scaler is not None
    torch.testing.assert_close(weights(scaled), weights(plain), rtol=1e-4, atol=1e-6)


def overflowing(monkeypatch, when):
    """Let the scaled loss of some (rank, step) overflow."""
    real = loop.descend
    now = {}

    def backward(self, loss):
        scaled = self.scaler.scale(loss)
        (scaled * math.inf if (self.world.rank, now[self.world.rank]) in when else scaled).backward()

    def descend(job, batch, step, clock):
        now[job.world.rank] = step
        return real(job, batch, step, clock)

    monkeypatch.setattr(loop, "descend", descend)
    monkeypatch.setattr(precision.Precision, "backward", backward)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=NAMES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_overflow_on_one_rank_leaves_the_step_out_on_all_at_one_scale(splits, optimizer, ranks, monkeypatch):
    recipe = replace(RECIPE, optimizer=optimizer, model=Mlp((8,)), steps=4, precision="float16")
    built = loop.build_model(recipe)
    monkeypatch.setattr(loop, "build_model", lambda _: copy.deepcopy(built))  # threads share one random generator
    overflowing(monkeypatch, {(ranks - 1, 2)})

    def work(world):
        job = prepare(recipe, world, splits)
        taking, after, scales = steps(job), [weights(job)], []
        for _ in taking:
            after.append(weights(job))
            scales.append(job.scaler.state_dict())
        return after, scales

    results = run_threads(ranks, work)
    for after, scales in results:
        moved = [not torch.equal(one, other) for one, other in itertools.pairwise(after)]
        assert moved == [True, False, True, True]
        assert [state["scale"] for state in scales] == [65536, 32768, 32768, 32768]
        assert [state["_growth_tracker"] for state in scales] == [1, 0, 1, 2]
        assert torch.equal(after[-1], results[0][0][-1])


def test_bits_are_scaled_only_in_float16(splits):
    for kind, scaled in (("float32", False), ("bfloat16", False), ("float16", True)):
        job = prepare(replace(RECIPE, precision=kind), World(), splits)
        assert (job.scaler is not None) is scaled
        if scaled:
            assert {"scale", "_growth_tracker"} <= set(job.scaler.state_dict())


@pytest.mark.parametrize("optimizer", [OPTIMIZERS[0], *OPTIMIZERS[2:6]], ids=[NAMES[0], *NAMES[2:6]])
def test_channels_last_is_another_order_in_memory_and_nothing_else(splits, optimizer):
    # widths in eights: oneDNN writes past a 1x1 stride-2 convolution of 4 channels last on processors without AVX-512
    recipe = replace(RECIPE, model=CifarResNet(8, (8, 16, 16)), optimizer=optimizer, steps=4)
    # borders of zeros sit on ReLU's kink; of some noise a pixel sits so near to it that rounding takes it across
    noise = torch.rand(splits.train.images.shape, generator=torch.Generator().manual_seed(4))
    images = splits.train.images + noise
    noisy = replace(splits, train=replace(splits.train, images=images))
    plain, _ = trained(recipe, World(), noisy)
    job = prepare(replace(recipe, channels_last=True), World(), noisy)
    orders = []
    inner = [m for m in job.model.modules() if isinstance(m, nn.Conv2d)][3]
    inner.register_forward_hook(
        lambda m, i, output: orders.append(output.is_contiguous(memory_format=torch.channels_last))
    )
    list(steps(job))
    assert orders
    assert all(orders)
    torch.testing.assert_close(weights(job), weights(plain), rtol=2e-3, atol=5e-4)


@pytest.fixture
def counted(monkeypatch):
    """Compile by tracing alone, and count the graphs that run."""
    gc.collect()
    capture._armed.clear()  # other tests' optimizers would have all compiled models run eagerly
    torch.compiler.set_stance("default")
    runs = []

    def backend(graph, inputs):
        def call(*args):
            runs.append(1)
            return graph(*args)

        return call

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda method: real(method, backend=backend))
    torch._dynamo.reset()
    gc.collect()  # an optimizer of an earlier test that is still watching keeps everything eager
    return runs


@pytest.mark.parametrize("model", [NET, Mlp((8,))], ids=["of its own class", "Sequential"])
@pytest.mark.parametrize("optimizer", [Sgd(lr=0.1), KFac(lr=0.1, refresh=4)], ids=["sgd", "kfac"])
def test_a_compiled_network_trains_and_is_judged_as_it_was(splits, optimizer, model, counted):
    recipe = replace(RECIPE, model=model, optimizer=optimizer, steps=7, average=0.9, batch=700)
    plain, _ = trained(recipe, World(), splits)
    job = prepare(replace(recipe, compile=True), World(), splits)
    ran = []
    for _ in steps(job):
        ran.append(len(counted))
        counted.clear()
    torch.testing.assert_close(weights(job), weights(plain), rtol=1e-4, atol=1e-5)
    measured = [0, 4] if isinstance(optimizer, KFac) else []
    assert [step for step, runs in enumerate(ran) if not runs] == measured  # these steps ran eagerly
    assert list(job.model.state_dict()) == list(plain.model.state_dict())
    one, other = job.score(), plain.score()
    assert (one.loss, one.accuracy) == pytest.approx((other.loss, other.accuracy), rel=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_a_network_is_compiled_by_inductor(splits):
    recipe = replace(RECIPE, optimizer=SpNgd(lr=0.05, refresh=2), model=Mlp((8,)), steps=4)
    plain, _ = trained(recipe, World(), splits)
    torch._dynamo.reset()
    job, _ = trained(replace(recipe, compile=True), World(), splits)
    torch.testing.assert_close(weights(job), weights(plain), rtol=1e-4, atol=1e-5)
    assert list(job.model.state_dict()) == list(plain.model.state_dict())
    assert job.score().accuracy == pytest.approx(plain.score().accuracy, abs=0.01)


def test_compiling_without_a_compiler_is_refused_in_one_line(splits, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"compile=True .*g\+\+") as refused:
        prepare(replace(RECIPE, compile=True), World(), splits)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"precision": "float8"}, "precision='float8' is unknown; choose float32, bfloat16, float16"),
        ({"norms": "none"}, "norms='none' is unknown; choose estimate, average"),
        ({"norms": "average", "average": 0.9}, r"norms=average .*average=0\.9"),
    ],
)
def test_unknown_kinds_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        replace(RECIPE, **change).check_values()
