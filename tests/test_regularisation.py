"""Mixup and erasing as a recipe has them: their order, what is kept, and what cannot be."""

import pytest
import torch

from natgrad_lab.data import Regularisation, Regulariser
from natgrad_lab.data.mixup import RunningMixup, erase

LABELS = torch.tensor([0, 1, 2, 1])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batches(count: int) -> list[torch.Tensor]:
    return [torch.rand(4, 2, 8, 8, generator=seeded(10 + k)) + 1 for k in range(count)]  # no pixel is zero


def test_without_a_word_nothing_happens():
    inputs = batches(1)[0]
    same, labels = Regulariser(Regularisation(), 3)(0, inputs, LABELS, seeded())
    assert same is inputs
    assert labels is LABELS


@pytest.mark.parametrize("keep", [False, True])
def test_mixup_comes_before_erasing_and_what_is_kept_is_a_choice(keep):
    settings = Regularisation(mixup=0.6, per_sample=True, fresh_majority=True, erase=0.7, keep_erased=keep)
    work, generator = Regulariser(settings, 3), seeded()
    by_hand, again = RunningMixup(0.6, per_sample=True, fresh_majority=True), seeded()
    for inputs in batches(4):
        blended, soft = by_hand(inputs, LABELS, 3, again)
        expected = erase(blended, again, 0.7)
        if keep:
            by_hand.keep(expected)
        found, targets = work(0, inputs, LABELS, generator)
        assert torch.equal(found, expected)
        assert torch.equal(targets, soft)


def test_holes_live_on_in_the_release_and_end_in_the_paper():
    shade = {}
    for keep in (False, True):
        work, generator = Regulariser(Regularisation(mixup=1.0, erase=1.0, keep_erased=keep), 3), seeded()
        for inputs in batches(6):
            found, _ = work(0, inputs, LABELS, generator)
        shade[keep] = ((found > 0) & (found < 1)).double().mean().item()  # between a hole and an image
    assert shade[False] == 0
    assert shade[True] > 0.02


def test_parts_of_a_share_are_blended_with_their_own_past():
    work, generator = Regulariser(Regularisation(mixup=1.0), 3), seeded()
    one, other = torch.zeros(4, 1), torch.full((4, 1), 100.0)
    for _ in range(3):
        (low, _), (high, _) = work(0, one, LABELS, generator), work(1, other, LABELS, generator)
        assert low.eq(0).all()
        assert high.eq(100).all()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (Regularisation(mixup=-0.1), "mixup=-0.1"),
        (Regularisation(mixup=float("nan")), "mixup=nan"),
        (Regularisation(erase=1.5), "erase=1.5"),
        (Regularisation(erase=0.5, area=(0.3, 0.2)), r"area=\(0.3, 0.2\)"),
        (Regularisation(erase=0.5, aspect=(0.0, 1.0)), r"aspect=\(0, 1\)"),
        (Regularisation(per_sample=True), "per_sample says nothing"),
        (Regularisation(fresh_majority=True), "fresh_majority says nothing"),
        (Regularisation(erase=0.5, keep_erased=True), "keep_erased says nothing without mixup"),
        (Regularisation(mixup=0.5, keep_erased=True), "keep_erased says nothing without erasing"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings, says):
    with pytest.raises(ValueError, match=says) as refused:
        Regulariser(settings, 3)
    assert "\n" not in str(refused.value)
