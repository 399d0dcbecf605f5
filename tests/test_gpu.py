"""What a GPU could do otherwise, on the CPU, on a simulated GPU (simulated.py) and on a GPU where there is one.

The CPU shows that the tests are right, the simulation that no step mixes devices and how often the host would wait.
What is compared draws nothing at random: generators of a GPU and of a CPU give other numbers for the same seed.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import natgrad
from helpers import OPTIMIZERS, Mixed, clone, made, weights
from natgrad.linalg import damped_cholesky, damped_inverse, eigen, first_cholesky, first_inverse
from simulated import DEVICE, simulated_gpu

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from gpu_steps import waits_of

CPU = torch.device("cpu")
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
REAL = ["cpu", pytest.param("cuda", marks=GPU)]
everywhere = pytest.mark.parametrize("where", [*REAL, "simulated"], indirect=True)
where_hosts_wait = pytest.mark.parametrize("where", [REAL[1], "simulated"], indirect=True)
where_autocast_works = pytest.mark.parametrize("where", REAL, indirect=True)
every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda o: o.__name__)
ON_HOST = ("step", "clock", "damping", "count", "went", "scalars")
"""Ends of the names of numbers, which stay on the host wherever the weights are."""


@pytest.fixture
def where(request):
    """The kind of device; a simulated one is there for the length of the test."""
    if request.param != "simulated":
        yield Where(torch.device(request.param))
    else:
        with simulated_gpu() as waits:
            yield Where(DEVICE, waits)


class Where(NamedTuple):
    """A device, and the waits that a simulated one counts."""

    device: torch.device
    counted: Counter | None = None

    def waits(self, call):
        """How often the host waits for the device within a call."""
        if self.counted is None:
            return waits_of(call)
        self.counted.clear()
        call()
        return self.counted.total()


class Images(nn.Module):
    """Convolutions with one of groups, a BatchNorm, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2), nn.Linear(8 * 16, 3)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.norm(self.first(x))))).flatten(1))

    @staticmethod
    def batch(n, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, 4, 8, 8, generator=generator, dtype=torch.float64)
        return x, torch.randint(3, (n,), generator=generator)


def built(kind, model, **options):
    """An optimizer that draws nothing at random and has measured anew in every second step."""
    if kind is natgrad.SENG:
        options = {"sketch": None, **options}
    return made(kind, model, **{"lr": 0.02, "damping": 0.3, "rows_per_dim": None, "refresh": 2, **options})


def descend(model, opt, x, y, context=None):
    """One step; returns the loss."""
    opt.zero_grad()
    with torch.autocast(x.device.type, context, enabled=context is not None):
        loss = F.cross_entropy(model(x).float() if context else model(x), y)
    loss.backward()
    opt.step()
    return loss.item()


def trained(kind, model, device, dtype=torch.float64, layout=torch.contiguous_format, context=None, steps=4, **options):
    """A copy of the model after some steps on a device, its optimizer, and the losses."""
    model = clone(model).to(device, dtype)
    if layout == torch.channels_last:
        model = model.to(memory_format=layout)
    opt, losses = built(kind, model, **options), []
    for k in range(steps):
        x, y = (t.to(device) for t in type(model).batch(32, k))
        if x.is_floating_point():
            x = x.to(dtype=dtype, memory_format=layout)
        losses.append(descend(model, opt, x, y, context))
    return model, opt, losses


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch):
    """cuDNN takes float32 for TF32 by default, and may add up in any order."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@everywhere
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-8), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("net", [Mixed, Images], ids=lambda n: n.__name__)
@every_optimizer
def test_steps_are_those_of_a_cpu_in_float64(kind, net, dtype, within, where):
    model = net()
    theirs, _, _ = trained(kind, model, CPU)
    ours, _, _ = trained(kind, model, where.device, dtype)
    start, end = weights(model).double(), weights(theirs)
    moved = weights(ours).double().cpu()
    assert float((end - start).norm()) > 1e-2
    assert float((moved - end).norm() / (end - start).norm()) < within


@everywhere
@every_optimizer
def test_channels_last_changes_no_step(kind, where):
    model = Images()
    usual, _, _ = trained(kind, model, where.device)
    last, opt, _ = trained(kind, model, where.device, layout=torch.channels_last)
    assert last.first.weight.is_contiguous(memory_format=torch.channels_last)
    assert_close(weights(last), weights(usual), rtol=1e-8, atol=1e-10)
    assert not opt.skipped


@where_autocast_works
@every_optimizer
def test_autocast_to_bfloat16_moves_nearly_the_same_way(kind, where):
    model = Images()
    exact, _, _ = trained(kind, model, where.device, torch.float32)
    rounded, opt, losses = trained(kind, model, where.device, torch.float32, context=torch.bfloat16)
    start = weights(model).to(where.device)
    steps = weights(exact) - start, weights(rounded) - start
    assert float(torch.cosine_similarity(*steps, dim=0)) > 0.99
    assert all(map(torch.isfinite, torch.tensor(losses)))
    floating = [v for own in opt.state.values() for v in own.values() if v.is_floating_point()]
    assert all(v.dtype in (torch.float32, torch.float64) for v in floating)  # numbers on the host are double


@where_autocast_works
@every_optimizer
def test_a_grad_scaler_changes_no_step_and_an_overflow_makes_none(kind, where):
    model = Images().to(where.device, torch.float64)
    other = clone(model)
    opts = built(kind, model), built(kind, other)
    scaler = torch.amp.GradScaler(where.device.type, init_scale=1024.0)
    for k in range(5):
        x, y = (t.to(where.device) for t in Images.batch(32, k))
        spoilt = k == 2
        before = weights(other)
        scaler.scale(F.cross_entropy(other(x), y) * (float("inf") if spoilt else 1.0)).backward()
        scaler.step(opts[1])
        scaler.update()
        opts[1].zero_grad()
        if spoilt:
            assert torch.equal(weights(other), before)
            with torch.no_grad():
                model(x)  # its BatchNorm has seen the batch too
            opts[0].zero_grad()
        else:
            descend(model, opts[0], x, y)
    assert opts[1].skipped == 1
    assert scaler.get_scale() == 512.0
    assert_close(weights(other), weights(model), rtol=1e-7, atol=1e-9)


@where_autocast_works
@every_optimizer
def test_float16_with_a_grad_scaler_learns(kind, where):
    model = Mixed().to(where.device)
    opt = made(kind, model, lr=0.03, damping=0.3, refresh=2)
    scaler = torch.amp.GradScaler(where.device.type)
    x, y = (t.to(where.device) for t in Mixed.batch(64, 0))
    losses = []
    for _ in range(20):
        with torch.autocast(where.device.type, torch.float16):
            loss = F.cross_entropy(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@where_hosts_wait
def test_waits_are_counted(where):
    x = torch.ones(3, device=where.device)
    assert where.waits(lambda: x.add_(1).mul_(2)) == 0
    assert where.waits(lambda: (x.sum().item(), x.max().item())) == 2


PLAIN, MEASURING = 1, 2
"""Waits of a plain step at most, and of one that measures."""


@where_hosts_wait
@pytest.mark.parametrize("refresh", [10**9, 1], ids=["plain", "all stale"])
@pytest.mark.parametrize("net", [Mixed, Images], ids=lambda n: n.__name__)
@every_optimizer
def test_the_host_hardly_waits_for_the_device(kind, net, refresh, where):
    """Every measurement has the checksums of all layers here, which are read in one go."""
    model = net().to(where.device)
    opt = built(kind, model, refresh=refresh)
    x, y = (t.to(where.device) for t in net.batch(32, 0))
    x = x.float() if x.is_floating_point() else x
    for _ in range(3):
        descend(model, opt, x, y)
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    own = int(kind is natgrad.SENG and net is Mixed)  # the tokens that occur
    assert where.waits(opt.step) <= (PLAIN if refresh > 1 else MEASURING + own)


def moved(opt, device):
    """Every tensor of the state on a device, as trainers put it when they load a checkpoint."""
    for own in opt.state.values():
        for key, value in own.items():
            if isinstance(value, torch.Tensor):
                own[key] = value.to(device, copy=True)


@everywhere
@every_optimizer
def test_a_state_that_a_trainer_moves_keeps_its_numbers_on_the_host(kind, where):
    model = Images()
    ours, opt, _ = trained(kind, model, where.device)
    theirs, other, _ = trained(kind, model, where.device)
    moved(opt, where.device)
    for k in range(4, 7):
        x, y = (t.to(where.device) for t in Images.batch(32, k))
        for net, optimizer in ((ours, opt), (theirs, other)):
            descend(net, optimizer, x, y)
    assert_close(weights(ours), weights(theirs), rtol=1e-9, atol=1e-11)
    for own in opt.state.values():
        for key, value in own.items():
            assert value.device.type == ("cpu" if key.endswith(ON_HOST) else where.device.type), key


@everywhere
@every_optimizer
def test_a_state_is_loaded_to_where_the_weights_are(kind, where):
    _, opt, _ = trained(kind, Mixed(), where.device)
    for origin in ("here", "cpu"):
        saved = opt.state_dict()
        if origin == "cpu":  # torch.load(..., map_location="cpu")
            saved["state"] = {k: {n: v.cpu() for n, v in own.items()} for k, own in saved["state"].items()}
        other = built(kind, clone(Mixed()).to(where.device, torch.float64))
        other.load_state_dict(saved)
        for mine, theirs in zip(other.state.values(), opt.state.values()):
            assert {k: v.device for k, v in mine.items()} == {k: v.device for k, v in theirs.items()}
            for key, value in theirs.items():
                assert_close(mine[key], value, rtol=0, atol=0)


def symmetric(count, side, seed=0):
    """Positive matrices in float64."""
    rows = torch.randn(count, 2 * side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rows.transpose(1, 2) @ rows / (2 * side)


@everywhere
@pytest.mark.parametrize("side", [1, 2, 5, 33])
def test_factorisations_are_repaired_as_on_a_cpu(side, where):
    """One block is sound, one has a negative eigenvalue, one is not finite."""
    matrix = symmetric(3, side)
    matrix[1] -= 2 * torch.linalg.eigvalsh(matrix[1])[0] * torch.eye(side)
    matrix[1, 0, 0] -= 5
    matrix[2, 0, 0] = float("inf")
    damping = torch.full((3,), 0.1, dtype=torch.float64)
    there = matrix.to(where.device), damping.to(where.device)
    for first in (first_inverse, first_cholesky):
        ours, good = first(*there)
        theirs, sound = first(matrix, damping)
        assert good.tolist() == sound.tolist()
        assert good.tolist()[0]
        assert not all(good.tolist())
        assert_close(ours.cpu()[0], theirs[0], rtol=1e-9, atol=1e-9)
    for mend in (damped_inverse, damped_cholesky):
        (ours, tries), (theirs, retries) = mend(*there), mend(matrix, damping)
        assert tries == retries > 0
        assert bool(torch.isfinite(ours).all())
        assert_close(ours.cpu(), theirs, rtol=1e-8, atol=1e-9)


@everywhere
def test_eigenvalues_are_those_of_a_cpu(where):
    matrix = symmetric(4, 9)
    vectors, values, retries = eigen(matrix.to(where.device))
    assert not retries
    assert_close(values.cpu(), torch.linalg.eigvalsh(matrix), rtol=1e-9, atol=1e-9)
    assert_close((vectors * values[:, None]) @ vectors.transpose(1, 2), matrix.to(where.device), rtol=1e-8, atol=1e-9)


@everywhere
def test_a_run_survives_a_statistic_that_is_not_positive(where):
    """A statistic that something has spoilt is inverted with more damping, and the run counts it."""
    model, opt, _ = trained(natgrad.KFAC, Images(), where.device, steps=3, refresh=10**9, ema_decay=0.9)
    for key in "AG":
        opt.state[model.head.weight][key].neg_()
    opt.param_groups[0]["damping"] = 0.2  # another damping is another inverse
    x, y = (t.to(where.device) for t in Images.batch(32, 3))
    descend(model, opt, x, y)
    assert opt.engine.retries > 0
    assert bool(torch.isfinite(weights(model)).all())


@everywhere
@pytest.mark.parametrize("sketch", [natgrad.curvature.CountSketch(50), natgrad.curvature.Uniform(50)])
def test_sketches_work_on_every_device(sketch, where):
    model, _, losses = trained(natgrad.SENG, Mixed(), where.device, torch.float32, sketch=sketch)
    assert bool(torch.isfinite(weights(model)).all())
    assert all(map(torch.isfinite, torch.tensor(losses)))


@everywhere
@pytest.mark.parametrize("kind", [natgrad.SPNGD, natgrad.KFAC, natgrad.SENG], ids=lambda o: o.__name__)
def test_draws_on_a_device_follow_from_the_seed(kind, where):
    model = Images()
    runs = [trained(kind, model, where.device, rows_per_dim=2, refresh=1, seed=seed)[0] for seed in (1, 1, 2)]
    first, again, other = (weights(run) for run in runs)
    assert_close(again, first, rtol=1e-9, atol=1e-11)
    assert float((other - first).norm()) > 1e-4
