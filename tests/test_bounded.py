"""Bounded statistics: which samples norms take, and how many samples a bounded statistic is worth."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import natgrad
from natgrad.curvature import unitwise
from natgrad.curvature.kronecker import InputMoment, OutputMoment
from natgrad.curvature.unitwise import SampleMoment
from natgrad.layers import layer_of
from natgrad.refresh import History
from natgrad.sampling import Sampler


def draw(step=1, share=1.0):
    return Sampler(0, step, 0, share).draw(0, 0, torch.device("cpu"))


@pytest.mark.parametrize(("total", "wanted", "stride"), [(128, 64, 2), (191, 64, 2), (1000, 64, 15), (127, 64, 1)])
def test_samples_are_one_of_every_few_from_a_random_first(total, wanted, stride):
    if stride == 1:
        assert draw().every(total, wanted) is None
        return
    counts = torch.zeros(total)
    for step in range(400):
        chosen = draw(step=step).every(total, wanted)
        assert chosen == draw(step=step).every(total, wanted)
        assert wanted <= len(range(total)[chosen]) <= 2 * wanted
        counts[chosen] += 1
    assert set(range(stride)) == {draw(step=k).every(total, wanted).start for k in range(400)}
    assert float((counts / 400 * stride - 1).abs().max()) < 4 * (stride / 400) ** 0.5  # every sample as likely
    half = draw(share=0.5).every(total, wanted)
    assert half.step == total // (wanted // 2)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(
    "module",
    [nn.BatchNorm2d(4), nn.BatchNorm2d(4).eval(), nn.GroupNorm(2, 4), nn.LayerNorm([4, 3, 5]), nn.Conv2d(4, 2, 1)],
    ids=lambda m: f"{type(m).__name__}{m.training}",
)
def test_bounded_f_is_that_of_the_chosen_samples(module, last, monkeypatch):
    """Bounded, SampleMoment sees what it sees of everything, at the chosen samples, each for `step` of them."""
    monkeypatch.setattr(unitwise, "LEAST_SAMPLES", 5)
    module = module.double()
    layer, x = layer_of(module), torch.randn(21, 4, 3, 5, dtype=torch.float64).requires_grad_()
    x = x.to(memory_format=torch.channels_last) if last else x * 1
    out = module(x)
    dy, pick = torch.randn_like(out), draw()
    chosen = pick.every(21, 5)
    few, every = (SampleMoment(n) for n in (1, None))
    parts = [m.after(layer, m.before(layer, x.detach(), pick, out), dy, pick) for m in (few, every)]
    assert (chosen.step, few.effective_samples(layer, 21, 21), every.effective_samples(layer, 21, 21)) == (4, 6, 21)
    few_units, units = map(unitwise.written, parts)
    assert_close(few_units, units[chosen] * 2)


def test_what_a_bounded_statistic_is_worth():
    """Adaptive widens its tolerance by the samples behind a statistic, not by those of the batch."""
    conv, wide, norm = (layer_of(m) for m in (nn.Conv2d(16, 16, 1, bias=False), nn.Linear(600, 9), nn.BatchNorm2d(4)))
    assert [InputMoment(8).effective_samples(conv, n, n) for n in (50, 128, 10**6)] == [50, 64, 64]
    assert [InputMoment(8).effective_samples(wide, n, n) for n in (128, 512, 10**6)] == [128, 512, 512]
    assert [OutputMoment(8).effective_samples(wide, n, n) for n in (128, 10**6)] == [128, 512]
    assert [SampleMoment(8).effective_samples(norm, n, 7 * n) for n in (50, 128, 191, 4096)] == [50, 64, 96, 64]
    for moment in (InputMoment(None), OutputMoment(None), InputMoment(8, diagonal=True)):
        assert moment.effective_samples(wide, 50, 10**6) == 10**6  # each character of a text is a term of its own
    assert InputMoment(8).effective_samples(wide, 50, 3200) == 512
    assert SampleMoment(None).effective_samples(norm, 50, 3200) == 50  # whole samples add up before they are squared


def test_the_characters_of_a_text_are_counted():
    """64 texts of 16 characters widen the tolerance as 512 images do, not as 64."""

    class Asked(natgrad.Adaptive):
        def next(self, memory):
            asked.append(memory.samples)
            return super().next(memory)

    asked = []
    net = nn.Sequential(nn.Linear(256, 8), nn.LayerNorm(8), nn.Linear(8, 5))
    opt = natgrad.SPNGD(net, lr=0.1, refresh=Asked())
    x, y = torch.randn(64, 16, 256), torch.randint(5, (64, 16))
    torch.nn.functional.cross_entropy(net(x).flatten(0, 1), y.flatten()).backward()
    opt.step()
    assert asked == [512, 512, 64, 36, 512]  # A, G; F of the norm; A of 8 inputs and a bias, G


def test_two_draws_of_one_batch_are_alike():
    """The noise of sampling is below the tolerance that goes with it, whatever the batch: 0.28 for A at r = 8."""
    torch.manual_seed(0)
    layer = layer_of(nn.Conv2d(16, 5, 3, stride=2).double())
    x = torch.randn(1500, 16, 9, 9, dtype=torch.float64).relu() * torch.rand(1500, 1, 1, 1, dtype=torch.float64)
    moment = InputMoment(8)
    one, other = (moment.before(layer, x, draw(step)) for step in (1, 2))
    change = float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(one))
    assert change > 0.1  # no longer alike by the paper's tolerance for the whole batch, at 4,096 samples
    rule = natgrad.Adaptive()
    assert rule.next(History((change, change), 8, 5, moment.effective_samples(layer, 4096, 4096))) == 13
    assert rule.next(History((change, change), 8, 5, 4096)) == 4
