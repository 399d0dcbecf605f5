"""Images that cannot be decoded: named, counted, replaced in one way only, and too many of them end the run."""

import pytest
import torch

from natgrad_lab.data import Cifar10, ImageSet, hold_out, pictures
from pictures import write_images
from test_cifar import write_cifar


@pytest.fixture(autouse=True)
def _workers_for_few(monkeypatch):
    monkeypatch.setattr(pictures, "ENOUGH", 5)


def broken(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"")
    return [f"{folder / name} (empty)" for name in names]


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_good_image_stands_in_with_its_label(tmp_path, in_memory, workers):
    write_images(tmp_path, count=3)
    names = broken(tmp_path, "train/cat/0.png", "train/cat/2.png", "train/dog/0.png", "val/dog/2.png")
    splits = ImageSet(str(tmp_path), size=8, in_memory=in_memory, workers=workers).load()
    indices = (torch.tensor([2, 0, 4, 5]), torch.tensor([5, 3]))
    images, labels = zip(*(splits.train.batch(index) for index in indices))
    assert torch.cat(labels).tolist() == [1, 0, 1, 1, 1, 1]
    raw, places = splits.train.raw(torch.arange(6))
    assert raw[:, 0, 0, 0].tolist() == [1, 1, 101, 101, 101, 102]
    assert splits.train.labels[places].tolist() == [0, 0, 1, 1, 1, 1]
    assert torch.equal(images[0][0], images[1][1])
    assert splits.test.raw(torch.tensor([5]))[0].unique().tolist() == [0]  # after the last comes the first
    assert splits.bad() == sorted(names)


def test_a_held_out_image_never_stands_in(tmp_path):
    write_images(tmp_path, count=6)
    splits = hold_out(ImageSet(str(tmp_path), size=8, in_memory=False).load(), 0.5, seed=0)
    kept = splits.train.images.decoder.places
    file = splits.train.images.decoder.table.name(int(kept[0]))
    open(file, "wb").close()
    (pixels, places), (other, _) = (splits.train.raw(torch.tensor([place])) for place in (0, 1))
    assert places.tolist() == [1]
    assert torch.equal(pixels, other)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_one_more_than_the_limit_ends_the_run(tmp_path, in_memory, workers):
    write_images(tmp_path, count=6)
    names = broken(tmp_path, *(f"train/cat/{number}.png" for number in (1, 3, 4, 5)))
    limited = {"size": 8, "in_memory": in_memory, "workers": workers}
    assert len(ImageSet(str(tmp_path), bad_limit=4, **limited).load().train.batch(torch.arange(12))[1]) == 12
    with pytest.raises(ValueError, match=r"4 images cannot be read \(bad_limit=3\)") as told:
        ImageSet(str(tmp_path), bad_limit=3, **limited).load().train.batch(torch.arange(12))
    assert f"{'; '.join(names[:3])}, ...: mend or remove them, or raise --data.bad-limit" in str(told.value)
    assert "\n" not in str(told.value)


def test_where_no_image_is_good_nothing_stands_in(tmp_path):
    write_images(tmp_path, count=2)
    broken(tmp_path, *(f"train/{name}/{number}.png" for name in ("cat", "dog") for number in (0, 1)))
    with pytest.raises(ValueError, match="4 images cannot be read"):
        ImageSet(str(tmp_path), size=8).load()


def test_rows_of_parquet_files_are_named(tmp_path):
    from datasets import Dataset

    write_cifar(tmp_path)
    file = tmp_path / "test-00000-of-00001.parquet"
    rows = Dataset.from_parquet(str(file), keep_in_memory=True).to_dict()
    rows["img"][4] = {"bytes": b"broken", "path": None}
    Dataset.from_dict(rows).to_parquet(str(file))
    splits = Cifar10(str(tmp_path)).load()
    assert splits.bad() == ["test row 4 (no image format that is known)"]
    assert splits.test.labels.tolist() == [0, 1, 2, 3, 5, 5, 6, 7, 8, 9]
    with pytest.raises(ValueError, match=r"1 images .*test row 4 \(no"):
        Cifar10(str(tmp_path), bad_limit=0).load()


def test_limits_below_zero_are_refused():
    for wrong in ("bad_limit", "workers"):
        with pytest.raises(ValueError, match=rf"{wrong}=-1 .*set --data\.{wrong.replace('_', '-')}"):
            ImageSet(**{wrong: -1})
