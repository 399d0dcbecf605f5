"""CIFAR-10 and CIFAR-100 as the hub's parquet files hold them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from natgrad_lab.data import Cifar10, Cifar100, Images, decoded_cache
from natgrad_lab.data.augment import CropFlip
from natgrad_lab.data.pictures import Decoder
from natgrad_lab.data.subsets import shrunk
from pictures import plain, write_images


def write_cifar(folder: Path, labels=("label",), counts=(20, 10)):
    """Files as on the hub: train in two parts, test in one; image k is all k, its labels k modulo 10."""
    from datasets import Dataset

    for split, count in zip(("train", "test"), counts):
        numbers = np.array_split(np.arange(count), 2 if split == "train" else 1)
        for part, some in enumerate(numbers):
            images = [plain(number) for number in some]
            columns = {name: (some % 10).tolist() for name in labels}
            file = folder / f"{split}-{part:05}-of-{len(numbers):05}.parquet"
            Dataset.from_dict({"img": images, **columns}).to_parquet(str(file))


def test_cifar10_is_read_from_the_hubs_files(tmp_path):
    write_cifar(tmp_path)
    source = Cifar10(str(tmp_path))
    splits = source.load()
    assert (source.shape(), source.classes()) == ((3, 32, 32), 10)
    assert splits.train.images.shape == (20, 3, 32, 32)
    assert splits.train.images.dtype == torch.uint8
    assert splits.train.images[:, 0, 0, 0].tolist() == list(range(20))
    assert splits.train.labels.tolist() == [*range(10)] * 2
    assert splits.test.labels.tolist() == [*range(10)]
    inputs, _ = splits.test.batch(torch.tensor([5]))
    torch.testing.assert_close(
        inputs[0, :, 3, 4], (5 - torch.tensor([125.3, 123.0, 113.9])) / torch.tensor([63, 62.1, 66.7])
    )


def test_cifar100_takes_fine_labels(tmp_path):
    write_cifar(tmp_path, labels=("fine_label", "coarse_label"))
    splits = Cifar100(str(tmp_path)).load()
    assert splits.train.labels.tolist() == [*range(10)] * 2
    assert (splits.train.classes, splits.train.mean) == (100, (129.3, 124.1, 112.4))


def test_files_of_the_other_set_are_refused_by_their_columns(tmp_path):
    write_cifar(tmp_path, labels=("fine_label", "coarse_label"))
    with pytest.raises(
        ValueError, match=r"no column 'label' but .*fine_label.*--data\.path.*uoft-cs/cifar10,"
    ) as refused:
        Cifar10(str(tmp_path)).load()
    assert "\n" not in str(refused.value)


def test_a_missing_folder_is_named():
    with pytest.raises(ValueError, match=r"no/such.*--data\.path.*CIFAR-10, the hub's uoft-cs/cifar10, or"):
        Cifar10("no/such").check()


def test_a_small_problem_is_made_of_the_first_classes_and_averaged_pixels(tmp_path):
    write_cifar(tmp_path)
    source = Cifar10(str(tmp_path), size=16, keep_classes=3, augment=False)
    splits, whole = source.load(), Cifar10(str(tmp_path)).load()
    assert (source.shape(), source.classes(), splits.train.classes) == ((3, 16, 16), 3, 3)
    assert splits.train.labels.tolist() == [0, 1, 2] * 2
    assert splits.test.labels.tolist() == [0, 1, 2]
    assert splits.train.images.dtype == torch.uint8
    assert torch.equal(splits.train.images[:, :, 0, 0], whole.train.images[[0, 1, 2, 10, 11, 12]][:, :, 0, 0])


def test_averaged_pixels_are_means_of_squares():
    raw = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    small = shrunk(Images(raw, torch.zeros(5, dtype=torch.int64), 2, (0.0,) * 3, (1.0,) * 3), 8)
    exact = raw.double().view(5, 3, 8, 4, 8, 4).mean((3, 5))
    assert small.images.shape == (5, 3, 8, 8)
    assert (small.images.double() - exact).abs().max() <= 0.5


def test_a_subset_has_every_class_in_proportion_and_is_always_the_same(tmp_path):
    write_cifar(tmp_path, counts=(40, 20))
    splits, again = (Cifar10(str(tmp_path), subset=20).load() for _ in range(2))
    assert splits.train.labels.bincount().tolist() == [2] * 10
    assert len(splits.test) == 20
    assert torch.equal(splits.train.images, again.train.images)
    with pytest.raises(ValueError, match=r"subset=41 .* 40 images; set --data\.subset"):
        Cifar10(str(tmp_path), subset=41).load()


def test_smaller_images_are_shifted_less(tmp_path):
    write_cifar(tmp_path)
    assert Cifar10(str(tmp_path), size=16).load().augment == CropFlip(2)
    assert Cifar10(str(tmp_path)).load().augment == CropFlip(4)


@pytest.mark.parametrize("wrong", [{"size": 10}, {"keep_classes": 1}, {"keep_classes": 101}, {"subset": 0}])
def test_a_small_problem_that_cannot_be_is_refused(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=rf"{name}={value} must be .*set --data\.{name.replace('_', '-')}"):
        Cifar100(**wrong)


def test_class_folders_are_refused_by_name(tmp_path):
    write_images(tmp_path, classes=("cat", "cow"), count=2)
    with pytest.raises(ValueError, match=r"holds class folders of pictures, not CIFAR-100; add --data ImageSet"):
        Cifar100(str(tmp_path)).load()


def test_a_second_start_decodes_nothing(tmp_path, monkeypatch):
    """And other files, sizes and broken caches decode anew."""
    monkeypatch.setattr(decoded_cache, "LEAST", 5)
    monkeypatch.setenv("NATGRAD_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    write_cifar(data)
    first, decoded = Cifar10(str(data)).load(), []
    real = Decoder.__getitems__
    monkeypatch.setattr(Decoder, "__getitems__", lambda self, places: decoded.append(places) or real(self, places))
    again = Cifar10(str(data)).load()
    assert decoded == []
    assert torch.equal(again.train.images, first.train.images)
    assert torch.equal(again.train.labels, first.train.labels)
    kept = sorted((tmp_path / "cache").iterdir())
    assert len(kept) == 2
    kept[0].write_bytes(b"no pixels")
    third = Cifar10(str(data)).load()
    assert decoded
    assert torch.equal(third.test.images, first.test.images)
    decoded.clear()
    write_cifar(data, counts=(21, 10))
    assert len(Cifar10(str(data)).load().train) == 21
    assert decoded
    decoded.clear()
    monkeypatch.setenv("NATGRAD_CACHE", "")
    Cifar10(str(data)).load()
    assert decoded


def test_a_disk_that_is_full_keeps_nothing_and_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(decoded_cache, "LEAST", 5)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NATGRAD_CACHE", str(tmp_path / "file"))
    write_cifar(tmp_path)
    assert len(Cifar10(str(tmp_path)).load().train) == 20
