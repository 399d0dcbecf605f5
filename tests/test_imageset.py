"""Images of any set: read at once or when asked for, cut as SP-NGD cuts them, less their mean image."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from natgrad.parallel import World
from natgrad_lab.data import ImageSet
from natgrad_lab.data.augment import Crop, Zoom
from natgrad_lab.data.pictures import Pictures
from natgrad_lab.train.evaluate import evaluate
from pictures import write_images

DATA = Path(os.environ.get("NATGRAD_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))


def test_a_folder_of_images_is_read_at_one_size(tmp_path):
    write_images(tmp_path)
    source = ImageSet(str(tmp_path), size=6)
    splits = source.load()
    assert splits.train.images.shape == (4, 3, 6, 6)
    assert splits.train.images.dtype == torch.uint8
    assert splits.train.labels.tolist() == [0, 0, 1, 1]
    assert splits.test.images.flatten(1).float().mean(1).tolist() == [0, 1, 100, 101]
    assert (source.shape(), source.classes()) == ((3, 6, 6), 2)


def test_a_zoom_cuts_a_part_of_an_image_and_brings_it_to_one_size():
    rows = torch.arange(64.0).view(1, 1, 64, 1).expand(400, 1, 64, 64)
    images = torch.cat([rows, rows.transpose(2, 3)], 1)
    cut = Zoom(16, (0.1, 0.5))(images, torch.Generator().manual_seed(0))
    assert cut.shape == (400, 2, 16, 16)
    steps = torch.stack([cut[:, 0].diff(dim=1).mean((1, 2)), cut[:, 1].diff(dim=2).mean((1, 2))])
    tall, wide = steps * 16 / 64  # shares of the image's height and width
    area, ratio = tall * wide, tall / wide
    assert 0.08 < area.min() < 0.13
    assert 0.45 < area.max() < 0.53
    assert abs(area.mean() - 0.3) < 0.03
    assert 0.7 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.4
    assert cut.min() < 3
    assert cut.max() > 60
    whole = Zoom(64, (1.0, 1.0))(images[:1].byte(), torch.Generator().manual_seed(3))
    assert whole.dtype == torch.float32
    torch.testing.assert_close(Zoom(20)(images, None), Crop(20)(images, None))


def test_a_folder_is_zoomed_into_while_learning_only(tmp_path):
    write_images(tmp_path)
    splits = ImageSet(str(tmp_path), size=16, crop=8, zoom=(0.2, 0.5)).load()
    assert splits.train.cut == Zoom(8, (0.2, 0.5))
    assert splits.test.cut == Crop(8, random=False)
    inputs, _ = splits.train.batch(torch.arange(4), torch.Generator().manual_seed(0))
    assert inputs.shape == (4, 3, 8, 8)


@pytest.mark.parametrize("wrong", [{"zoom": (0.5, 0.2)}, {"zoom": (0.0, 1.0)}, {"crop": None}, {"augment": False}])
def test_a_zoom_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=r"zoom=.*--data\.crop"):
        ImageSet(**{"size": 16, "crop": 8, "zoom": (0.1, 1.0), **wrong})


def test_a_folder_without_validation_images_is_refused(tmp_path):
    write_images(tmp_path)
    for picture in (tmp_path / "val").rglob("*.png"):
        picture.unlink()
    with pytest.raises(ValueError, match="val/CLASS"):
        ImageSet(str(tmp_path)).check()


@pytest.mark.skipif(not (DATA / "tinyimagenet10").is_dir(), reason="no tinyimagenet10 in NATGRAD_DATA")
def test_real_pictures_in_class_folders_are_read():
    splits = ImageSet(str(DATA / "tinyimagenet10"), size=16).load()
    assert (len(splits.train), len(splits.test), splits.train.classes) == (5000, 500, 10)
    assert splits.train.images.float().std() > 30


def grid(n: int, size: int) -> torch.Tensor:
    """Images whose pixel (row, column) is 10 row + column, the second channel one more."""
    pixels = 10 * torch.arange(size).view(-1, 1) + torch.arange(size)
    return torch.stack((pixels, pixels + 1)).expand(n, 2, size, size)


def test_a_crop_is_anywhere_while_learning_and_in_the_middle_otherwise():
    images = grid(500, 5)
    found = Crop(3, random=True)(images, torch.Generator().manual_seed(0))
    assert set(found[:, 0, 0, 0].tolist()) == {10 * row + column for row in range(3) for column in range(3)}
    corner = found[:, :1, :1, :1]
    assert torch.equal(found, corner + grid(500, 3))
    middle = grid(500, 3) + 11
    assert torch.equal(Crop(3, random=True)(images, None), middle)
    assert torch.equal(Crop(3)(images, torch.Generator()), middle)


def test_the_papers_preprocessing(tmp_path):
    """Resized, cut, less the upper left of the mean image, over 255; the middle for judging."""
    write_images(tmp_path, count=3)
    source = ImageSet(str(tmp_path), size=10, crop=8, subtract="image")
    plain = ImageSet(str(tmp_path), size=10).load()
    splits = source.load()
    assert source.shape() == (3, 8, 8)
    mean = plain.train.images.double().mean(0)[:, :8, :8].float()
    for images, raw in ((splits.train, plain.train), (splits.test, plain.test)):
        inputs, labels = images.batch(torch.arange(6))
        torch.testing.assert_close(inputs, (raw.images[:, :, 1:9, 1:9] - mean) / 255)
        assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert splits.train.batch(torch.arange(6), torch.Generator())[0].shape == (6, 3, 8, 8)


def test_training_images_are_cut_anew_and_mirrored_unless_told_otherwise(tmp_path):
    from PIL import Image

    write_images(tmp_path, count=1)
    noise = np.random.default_rng(0).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "train" / "cat" / "0.png")
    places = torch.zeros(100, dtype=torch.int64)
    for augment, least in ((True, 10), (False, 1)):
        splits = ImageSet(str(tmp_path), size=12, crop=9, augment=augment).load()
        generator = torch.Generator().manual_seed(0)
        varied = splits.augment(splits.train.batch(places, generator)[0], generator)
        kinds = len(varied.flatten(1).unique(dim=0))
        assert kinds >= least
        assert (kinds == 1) is not augment
        assert kinds <= 32


@pytest.mark.parametrize("crop", [None, 8])
def test_images_left_in_their_files_are_those_in_memory(tmp_path, crop):
    write_images(tmp_path, count=4)
    source = ImageSet(str(tmp_path), size=10, crop=crop, subtract="image")
    kept, read = source.load(), replace(source, in_memory=False).load()
    assert isinstance(read.train.images, Pictures)
    assert len(read.train) == 8
    index = torch.tensor([7, 0, 3, 3])
    for a, b in zip(kept.train.batch(index), read.to(torch.device("cpu")).train.batch(index)):
        assert torch.equal(a, b)
    taken = read.train.take(torch.tensor([5, 1]))
    assert torch.equal(taken.batch(torch.tensor([1]))[0], kept.train.batch(torch.tensor([1]))[0])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * source.seen**2, 2))
    assert evaluate(model, read.test, World()) == evaluate(model, kept.test, World())


def test_a_crop_larger_than_the_images_is_refused():
    with pytest.raises(ValueError, match=r"crop=65 .*size=64; set --data\.crop"):
        ImageSet(crop=65)
