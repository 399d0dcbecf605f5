"""The simulated GPU: it refuses what a GPU refuses, counts what a GPU waits for, and computes what the CPU computes."""

import pytest
import torch
from torch import nn

from simulated import DEVICE, Generator, Simulated, simulated_gpu


@pytest.fixture
def waits():
    with simulated_gpu() as counted:
        yield counted


def test_tensors_say_where_they_are(waits):
    x = torch.ones(3, 2).to(DEVICE)
    for made in (x, x + 1, x[1:], torch.zeros(2, device=DEVICE), x.new_zeros(2), torch.zeros_like(x), x.T, x.sum()):
        assert isinstance(made, Simulated)
        assert made.device == DEVICE
        assert made.is_cuda
    assert x.cpu().device.type == "cpu"
    assert x.to("cpu").device.type == "cpu"
    assert torch.ones(2).to(x).device == DEVICE
    model = nn.Linear(2, 2).to(DEVICE)
    assert all(p.device == DEVICE and isinstance(p, nn.Parameter) for p in model.parameters())


def test_devices_do_not_mix(waits):
    there, here = torch.ones(3, device=DEVICE), torch.ones(3)
    for mixed in (lambda: there + here, lambda: torch.cat([there, here]), lambda: there.addcmul_(here, here)):
        with pytest.raises(RuntimeError, match="on cuda:0 and on the CPU"):
            mixed()
    assert (there * torch.tensor(2.0)).tolist() == [2.0] * 3  # numbers may come from anywhere


@pytest.mark.parametrize(
    ("call", "times"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool(x.isfinite().all()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.to("cpu"), 1),
        (lambda x: torch.tensor([1.0], device=x.device), 1),
        (lambda x: torch.ones(4).to(x.device), 1),
        (lambda x: torch.ones(4).to(x.device, non_blocking=True), 0),
        (lambda x: x.copy_(torch.ones(4)), 1),
        (lambda x: torch.ones(4).copy_(x), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x[torch.tensor([0, 1])], 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x.repeat_interleave(torch.arange(4).to(x.device, non_blocking=True)), 1),
        (lambda x: x.repeat_interleave(torch.arange(4).to(x.device, non_blocking=True), output_size=6), 0),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: x.mul_(2).add(1).view(2, 2)[0].sum(), 0),
        (lambda x: torch.zeros(3, device=x.device).fill_(1), 0),
        (lambda x: torch._foreach_add_([x, x], 1.0), 0),
        (lambda x: torch.linalg.cholesky_ex(torch.eye(2, device=x.device)), 0),
        (lambda x: torch.linalg.eigh(torch.eye(2, device=x.device)), 1),
    ],
)
def test_waits_are_what_a_gpu_waits_for(call, times, waits):
    x = torch.ones(4, device=DEVICE)
    waits.clear()
    call(x)
    assert waits.total() == times


def test_gradients_and_hooks_are_those_of_the_cpu(waits):
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)),
        torch.randn(5, 2, 4, 4),
    )
    seen, found = [], []
    for device in (torch.device("cpu"), DEVICE):
        own = model.to(device)
        handle = own[0].weight.register_hook(lambda g: seen.append(g.to(g.device) is g))
        own.zero_grad()
        own(x.to(device)).square().mean().backward()
        handle.remove()
        found.append([p.grad.cpu() for p in own.parameters()])
    assert seen == [True, True]
    assert all(torch.equal(one, other) for one, other in zip(*found))


def test_draws_are_those_of_the_cpu(waits):
    draws = [
        torch.rand(3, generator=torch.Generator(device).manual_seed(1), device=device).cpu()
        for device in (torch.device("cpu"), DEVICE)
    ]
    assert torch.equal(*draws)
    assert torch.Generator(DEVICE).device == DEVICE


def test_nothing_of_it_stays():
    before = torch.Generator, torch.autograd._engine_run_backward
    with simulated_gpu():
        assert torch.Generator is Generator
    assert (torch.Generator, torch.autograd._engine_run_backward) == before
    assert not torch.__future__.get_overwrite_module_params_on_conversion()
    assert type(torch.ones(2) + 1) is torch.Tensor
