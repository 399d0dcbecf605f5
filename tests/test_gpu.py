"""What only a GPU shows: the same steps as on the CPU, in single precision, with and without autocast."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import natgrad
from helpers import OPTIMIZERS, Mixed, clone, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def trained(kind, model, device, **options):
    """Weights on the CPU after some steps on `device`, and the optimizer."""
    model = clone(model).to(device)
    opt = kind(model, lr=0.02, damping=0.3, samples=None, refresh=2, **options)
    for k in range(6):
        x, y = (t.to(device) for t in Mixed.batch(32, k))
        F.cross_entropy(model(x).float(), y).backward()
        opt.step()
        opt.zero_grad()
    return weights(model).cpu(), opt


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda o: o.__name__)
def test_a_gpu_takes_the_steps_of_a_cpu(kind):
    torch.manual_seed(0)
    model = Mixed()
    (on_cpu, _), (on_gpu, opt) = (trained(kind, model, device) for device in ("cpu", "cuda"))
    assert_close(on_gpu, on_cpu, rtol=1e-2, atol=1e-3)
    held = [
        v for s in opt.state.values() for k, v in s.items() if not k.endswith(("step", "clock", "damping", "count"))
    ]
    assert all(v.is_cuda for v in held)


@pytest.mark.parametrize(
    "sketch", [natgrad.CountSketch(50), natgrad.Uniform(50), natgrad.RowNorm(50), natgrad.Gaussian(50)]
)
def test_sketches_on_a_gpu(sketch):
    torch.manual_seed(0)
    final, _ = trained(natgrad.SENG, Mixed(), "cuda", sketch=sketch)
    assert bool(torch.isfinite(final).all())


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda o: o.__name__)
def test_states_stay_on_the_gpu(kind):
    model = Mixed().cuda()
    _, opt = trained(kind, model, "cuda")
    saved = opt.state_dict()
    other = kind(clone(model), lr=0.02, damping=0.3, samples=None, refresh=2)
    other.load_state_dict(saved)
    for mine, theirs in zip(other.state.values(), opt.state.values()):
        assert {k: v.device for k, v in mine.items()} == {k: v.device for k, v in theirs.items()}


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda o: o.__name__)
def test_float16_with_a_grad_scaler(kind):
    torch.manual_seed(0)
    model = Mixed().cuda()
    opt, scaler = kind(model, lr=0.03, damping=0.3, refresh=2), torch.amp.GradScaler("cuda")
    x, y = (t.cuda() for t in Mixed.batch(64, 0))
    losses = []
    for _ in range(20):
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
