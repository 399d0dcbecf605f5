"""Class folders that are not quite as they should be: right, or refused by name."""

import pytest

from natgrad_lab.data import ImageSet
from natgrad_lab.data.folders import class_folders
from pictures import write_images


def test_files_are_found_below_classes_in_order(tmp_path):
    write_images(tmp_path)
    below = tmp_path / "train" / "cat" / "more.jpg"  # a folder with an ending
    below.mkdir()
    (tmp_path / "train" / "cat" / "0.png").rename(below / "A.PNG")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / "train" / ".cache").mkdir()
    train, _ = class_folders(str(tmp_path))
    names = [str(path)[len(str(tmp_path)) :] for path in train.encoded(list(range(4)))]
    assert names == ["/train/cat/1.png", "/train/cat/more.jpg/A.PNG", "/train/dog/0.png", "/train/dog/1.png"]
    assert (train.labels.tolist(), train.classes) == ([0, 0, 1, 1], 2)


def test_links_are_followed_once(tmp_path):
    write_images(tmp_path / "real")
    (tmp_path / "train").symlink_to(tmp_path / "real" / "train")
    (tmp_path / "val").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "val" / name).symlink_to(tmp_path / "real" / "val" / name)
    (tmp_path / "real" / "train" / "dog" / "round").symlink_to(tmp_path / "real" / "train" / "dog")
    (tmp_path / "real" / "val" / "cat" / "one.png").symlink_to(tmp_path / "real" / "val" / "cat" / "0.png")
    train, val = class_folders(str(tmp_path))
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 0, 1, 1], [0, 0, 0, 1, 1])


def test_a_link_to_nothing_is_an_unreadable_image(tmp_path):
    write_images(tmp_path)
    (tmp_path / "train" / "cat" / "2.png").symlink_to(tmp_path / "nothing.png")
    splits = ImageSet(str(tmp_path), size=8, workers=0).load()
    assert splits.bad() == [f"{tmp_path / 'train' / 'cat' / '2.png'} (not there)"]


def test_a_class_that_only_validation_has_is_refused(tmp_path):
    write_images(tmp_path)
    (tmp_path / "val" / "emu").mkdir()
    with pytest.raises(ValueError, match=r"val/emu' is a class that .*/train does not have"):
        ImageSet(str(tmp_path)).check()


def test_a_class_without_images_is_refused(tmp_path):
    write_images(tmp_path)
    (tmp_path / "train" / "cow").mkdir()
    with pytest.raises(ValueError, match=r"train/cow' has no images"):
        ImageSet(str(tmp_path)).check()


def test_a_class_may_lack_validation_images(tmp_path):
    write_images(tmp_path)
    for file in (tmp_path / "val" / "cat").iterdir():
        file.unlink()
    assert class_folders(str(tmp_path))[1].labels.tolist() == [1, 1]


@pytest.mark.parametrize("name", ["validation", "test"])
def test_the_folder_to_be_judged_by_may_have_another_name(tmp_path, name):
    write_images(tmp_path)
    (tmp_path / "val").rename(tmp_path / name)
    assert class_folders(str(tmp_path))[1].split == name
