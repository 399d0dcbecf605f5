"""Running mixup follows its recursion; erasing makes rectangles of the stated sizes."""

import pytest
import torch

from natgrad_lab.data.mixup import RunningMixup, erase


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_blends_the_last_blend_and_not_the_last_batch():
    mixup, shares, generator = RunningMixup(0.6), RunningMixup(0.6), seeded()
    inputs, targets = mixup(torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 2]), 3, generator)
    assert inputs.eq(0).all()
    assert torch.equal(targets, torch.eye(3))
    expected, soft = inputs, targets
    again = seeded()
    for step in range(1, 4):
        fresh, labels = torch.full((3, 1, 2, 2), float(step)), torch.tensor([step % 3] * 3)
        share = shares.draw(1, again).float()
        expected = share * fresh + (1 - share) * expected
        soft = share * torch.nn.functional.one_hot(labels, 3) + (1 - share) * soft
        inputs, targets = mixup(fresh, labels, 3, generator)
        torch.testing.assert_close(inputs, expected)
        torch.testing.assert_close(targets, soft)


@pytest.mark.parametrize("alpha", [0.4, 0.6, 1.0])
def test_shares_follow_beta(alpha):
    shares = RunningMixup(alpha).draw(200_000, seeded())
    assert shares.mean().item() == pytest.approx(0.5, abs=0.005)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.02)
    assert RunningMixup(alpha, fresh_majority=True).draw(1000, seeded()).min() >= 0.5


def test_a_share_for_each_sample_and_a_short_last_batch():
    mixup, generator = RunningMixup(1.0, per_sample=True), seeded()
    mixup(torch.zeros(64, 1), torch.zeros(64, dtype=torch.long), 2, generator)
    inputs, _ = mixup(torch.ones(64, 1), torch.ones(64, dtype=torch.long), 2, generator)
    assert len(inputs.unique()) > 60
    short, soft = mixup(torch.full((5, 1), 5.0), torch.ones(5, dtype=torch.long), 2, generator)
    assert (short > inputs[:5]).all()
    torch.testing.assert_close(soft.sum(1), torch.ones(5))
    long, _ = mixup(torch.full((70, 1), 9.0), torch.ones(70, dtype=torch.long), 2, generator)
    assert (long[:5] > short).all()  # blended with the short batch
    assert (long[5:64] > inputs[5:]).all()  # with those who waited
    assert (long[5:64] < 9).all()
    assert long[64:].eq(9).all()  # without a partner


def test_alpha_must_be_positive():
    with pytest.raises(ValueError, match="alpha=0"):
        RunningMixup(0.0)


def test_erased_rectangles():
    erased = erase(torch.ones(20_000, 2, 32, 32), seeded())
    assert torch.equal(erased[:, 0], erased[:, 1])
    holes = erased[:, 0] == 0
    share = holes.double().mean((1, 2))
    hit = share > 0
    assert hit.double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert share[hit].mean().item() == pytest.approx((0.02 + 0.25) / 2, rel=0.03)
    assert 0.01 < share[hit].min() <= share.max() < 0.28
    tall, wide = holes.any(2).sum(1)[hit], holes.any(1).sum(1)[hit]
    assert torch.equal(tall * wide, holes.sum((1, 2))[hit])  # full rectangles
    assert ((tall / wide > 0.25) & (tall / wide < 4)).all()
    assert (tall > wide).double().mean().item() == pytest.approx(0.5, abs=0.05)
