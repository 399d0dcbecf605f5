"""What --data.path may name: class folders, parquet files and the hub, with columns found by their types."""

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from natgrad_lab.data import Cifar10, ImageSet
from natgrad_lab.data.opening import Names, kind, open_tables
from pictures import plain, write_images

KINDS = Features(photo=Image(), kind=ClassLabel(names=["ant", "bee", "cow"]), where=Value("int64"))


def rows(labels=(0, 1, 2, 0), features=KINDS, **more):
    columns = {"photo": [plain(number, 8) for number in range(len(labels))], "kind": list(labels)}
    columns["where"] = [7] * len(labels)
    return Dataset.from_dict({**columns, **more}, features=features)


@pytest.fixture
def hub(monkeypatch):
    """The hub has these splits under any name; what is asked of it is returned."""
    asked, splits = [], DatasetDict(train=rows(), test=rows((-1, -1)), validation=rows((2, 1)))

    def load_dataset(path, config=None):
        asked.append((path, config))
        return splits

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked, splits


def test_a_data_set_of_the_hub_is_found_by_the_types_of_its_columns(hub):
    source = ImageSet("owner/insects-v1.0", size=8)
    splits = source.load()
    assert hub[0][0] == ("owner/insects-v1.0", None)
    assert (source.classes(), splits.train.classes) == (3, 3)
    assert splits.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert splits.train.labels.tolist() == [0, 1, 2, 0]
    assert splits.test.labels.tolist() == [2, 1]  # validation: the test's labels are not told


def test_a_configuration_and_other_splits_and_columns_are_named(hub):
    hub[1]["late"] = rows((1, 1)).add_column("second", [0, 1])
    hub[1]["early"] = rows((1, 2)).add_column("second", [2, 0])
    names = Names(train="early", test="late", image="photo", label="second", config="big")
    train, test = open_tables("owner/insects", names)
    assert hub[0] == [("owner/insects", "big")]
    assert (train.labels.tolist(), test.labels.tolist(), train.classes) == ([2, 0], [0, 1], 3)
    assert (train.split, test.split) == ("early", "late")


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (Names(train="all"), "no split 'all' but train, test, validation; set --data.names.train"),
        (Names(test="dev"), "no split 'dev' but train, test, validation; set --data.names.test"),
        (Names(label="color"), "no column 'color' but photo, kind, where; set --data.names.label"),
        (Names(image="color"), "no column 'color' but photo, kind, where; set --data.names.image"),
        (Names(label="photo"), "column 'photo' of 'owner/insects' holds no whole numbers"),
        (Names(test="test"), "test row 0 has label -1, as 1 others; labels must be 0 to 2"),
    ],
)
def test_names_that_are_not_there_are_refused(hub, names, line):
    with pytest.raises(ValueError, match=line):
        open_tables("owner/insects", names)


def saved(folder, **splits):
    for name, split in splits.items():
        split.to_parquet(str(folder / f"{name}-00000-of-00001.parquet"))
    return str(folder)


def test_parquet_files_say_what_their_columns_are(tmp_path):
    train, test = open_tables(saved(tmp_path, train=rows(), validation=rows((2,))))
    assert (train.classes, train.labels.tolist(), test.labels.tolist()) == (3, [0, 1, 2, 0], [2])
    assert [bytes_[1:4] for bytes_ in train.encoded([1, 3])] == [b"PNG"] * 2
    assert train.name(3) == "train row 3"


def test_a_picture_in_a_parquet_file_is_named_by_the_file_that_it_was(tmp_path):
    photos = [{**plain(number, 8), "path": f"{number}.png"} for number in range(4)]
    path = saved(tmp_path, train=rows(photo=photos), test=rows())
    assert open_tables(path)[0].name(2) == "train row 2 (2.png)"


def test_of_several_columns_one_must_be_named(tmp_path):
    features = Features(**{**KINDS, "other": Image(), "coarse": ClassLabel(num_classes=2)})
    both = rows(features=features, other=[plain(9, 8)] * 4, coarse=[0, 1, 1, 0])
    path = saved(tmp_path, train=both, test=both)
    with pytest.raises(ValueError, match=r"several columns of images, photo, other; name one by --data\.names\.image"):
        open_tables(path)
    with pytest.raises(ValueError, match=r"several columns of labels, kind, coarse; name one by --data\.names\.label"):
        open_tables(path, Names(image="photo"))
    assert open_tables(path, Names(image="other", label="coarse"))[0].classes == 2


@pytest.mark.parametrize(
    ("labels", "line"),
    [
        ((0, 1, 12, 0), r"train row 2 has label 12; labels must be 0 to 9"),
        ((0, -1, 2, -1), r"train row 1 has label -1, as 1 others; labels must be 0 to 9"),
        ((0, 1, 2, None), r"train row 3 has no label; labels must be 0 to 9"),
    ],
)
def test_labels_out_of_range_are_refused_by_row(tmp_path, labels, line):
    features = Features(photo=Image(), label=Value("int64"))
    wrong = Dataset.from_dict({"photo": [plain(0)] * 4, "label": list(labels)}, features=features)
    path = saved(tmp_path, train=wrong, test=wrong)
    with pytest.raises(ValueError, match=line):
        open_tables(path, classes=10)
    if min(label or 0 for label in labels) < 0 or None in labels:
        with pytest.raises(ValueError, match=line.split(";")[0]):
            open_tables(path)
    with pytest.raises(ValueError, match=line.split(";")[0]):
        Cifar10(path).check()


def test_labels_that_are_no_numbers_are_refused(tmp_path):
    for values in (["a", "b"], [0.5, 1.0]):
        words = Dataset.from_dict({"photo": [plain(0)] * 2, "label": values}).cast_column("photo", Image())
        path = saved(tmp_path, train=words, test=words)
        with pytest.raises(ValueError, match="no column of labels among photo, label"):
            open_tables(path)
        with pytest.raises(ValueError, match=r"'label' .*no whole numbers"):
            open_tables(path, Names(label="label"))


def test_files_that_are_no_parquet_are_refused(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}-0.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"parquet files in .* cannot be read") as refused:
        open_tables(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_what_the_hub_does_not_give_is_named_with_the_way_out():
    """Without a network, as all tests are."""
    for source in (ImageSet("owner/nothing"), Cifar10("owner/nothing")):
        with pytest.raises(ValueError, match=r"'owner/nothing' is no folder here, and the hub .*--data\.path") as told:
            source.check()
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("path", ["no/such/folder", "data/imagenet", "./no/such", "nothing", "tests/nothing"])
def test_what_looks_like_a_folder_is_not_looked_for_on_the_hub(path, hub):
    with pytest.raises(ValueError, match=rf"'{path}' is not there; --data\.path must name a folder"):
        open_tables(path)
    assert hub[0] == []


def test_kinds_of_paths(tmp_path):
    with pytest.raises(ValueError, match="neither class folders nor parquet files"):
        kind(str(tmp_path))
    saved(tmp_path, train=rows())
    assert kind(str(tmp_path)) == "parquet"
    write_images(tmp_path)
    assert kind(str(tmp_path)) == "folders"
    assert kind("uoft-cs/cifar100") == "hub"
