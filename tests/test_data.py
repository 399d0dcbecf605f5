"""Data: splits, batches on every rank, augmentation, and folders that are not what they should be."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from natgrad_lab.data import Cifar100, Digits, Images, ImageSet, Sampler, Splits, hold_out
from natgrad_lab.data.augment import crop_and_flip, flip, pad_crop, windows

DATA = Path(os.environ.get("NATGRAD_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))


@pytest.fixture(scope="module")
def digits():
    return Digits().load()


def test_digits_are_split_stratified_and_always_alike(digits):
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    shares = digits.test.labels.bincount() / (digits.test.labels.bincount() + digits.train.labels.bincount())
    assert (shares - 360 / 1797).abs().max() < 0.01
    again = Digits().load()
    assert torch.equal(again.test.images, digits.test.images)
    assert not torch.equal(Digits(split_seed=1).load().test.images, digits.test.images)


def test_digits_inputs_have_mean_zero_and_deviation_one(digits):
    inputs, labels = digits.train.batch(torch.arange(1437))
    assert inputs.shape == (1437, 1, 8, 8)
    assert inputs.mean().abs() < 0.02
    assert abs(inputs.std() - 1) < 0.02
    assert labels.dtype == torch.int64


def test_held_out_images_are_no_longer_trained_on():
    labels = torch.arange(100) % 5
    everything = Images(torch.arange(100.0).view(-1, 1, 1, 1), labels, 5, (0.0,), (1.0,))
    test = everything.take(torch.arange(3))
    splits = hold_out(Splits(everything, test), 0.2, seed=3)
    assert splits.test.labels.bincount().tolist() == [4] * 5
    both = torch.cat([splits.train.images, splits.test.images]).flatten()
    assert both.sort().values.tolist() == list(range(100))
    with pytest.raises(ValueError, match="share=1"):
        hold_out(Splits(everything, test), 1.0, seed=3)


@given(st.integers(5, 60), st.integers(2, 20), st.integers(1, 5), st.integers(1, 7), st.integers(0, 9))
def test_ranks_take_each_image_once_part_after_part(size, batch, ranks, micro, seed):
    if not ranks <= batch <= size:
        return
    images = Images(torch.arange(size).view(-1, 1, 1, 1), torch.arange(size), size, (0.0,), (1.0,))
    seen = []
    for rank in range(ranks):
        for share in Sampler(size, batch, seed, rank, ranks).epoch(seed):
            for index in share.index.split(micro):
                inputs, labels = images.batch(index)
                assert torch.equal(inputs.flatten().long(), labels)
                seen += labels.tolist()
    rest = size % batch
    assert len(seen) == len(set(seen)) == size - (rest if rest < ranks else 0)


@pytest.mark.parametrize("size", [33, 256, 500])
def test_windows_move_pixels_exactly(size):
    images = torch.randint(0, 256, (20, 3, size, size), dtype=torch.uint8)
    cut = 7 * size // 8
    corners = torch.randint(-5, size - cut + 6, (2, 20))
    padded = torch.nn.functional.pad(images, (5,) * 4).float()
    for found, image, (row, column) in zip(windows(images, corners, cut, cut - 3), padded, (corners + 5).T.tolist()):
        assert torch.equal(found, image[:, row : row + cut, column : column + cut - 3])


def test_pad_crop_shifts_whole_images():
    image = torch.arange(1.0, 65.0).view(1, 1, 8, 8).expand(200, 2, 8, 8)
    shifted = pad_crop(image, torch.Generator().manual_seed(0), padding=2)
    padded = torch.nn.functional.pad(image[:1], (2, 2, 2, 2))
    windows = {tuple(padded[0, 0, r : r + 8, c : c + 8].flatten().tolist()) for r in range(5) for c in range(5)}
    found = {tuple(one[0].flatten().tolist()) for one in shifted}
    assert found == windows
    assert torch.equal(shifted[:, 0], shifted[:, 1])


def test_flip_mirrors_about_half_of_the_images():
    images = torch.randn(1000, 1, 4, 4)
    mirrored = flip(images, torch.Generator().manual_seed(0))
    same = (mirrored == images).flatten(1).all(1)
    assert torch.equal(mirrored[~same], images[~same].flip(-1))
    assert 400 < int(same.sum()) < 600


def test_augmentation_depends_on_its_generator_alone():
    images = torch.randn(16, 3, 8, 8)
    one, same, other = (crop_and_flip(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("source", [Cifar100(path="no/such/place"), ImageSet(path="no/such/place")])
def test_a_missing_path_is_named_with_what_is_expected(source):
    with pytest.raises(ValueError, match=r"no/such/place.*--data\.path") as refused:
        source.check()
    assert "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "cifar100").is_dir(), reason="no CIFAR-100 in NATGRAD_DATA")
def test_cifar100_is_decoded_once_to_uint8():
    splits = Cifar100(str(DATA / "cifar100")).load()
    assert splits.train.images.shape == (50_000, 3, 32, 32)
    assert splits.train.images.dtype == torch.uint8
    assert splits.test.labels.bincount().tolist() == [100] * 100
    inputs, _ = splits.train.batch(torch.arange(0, 50_000, 50))
    assert inputs.mean().abs() < 0.05
    assert abs(inputs.std() - 1) < 0.05
