"""What a release promises: one version, old names written down, a wheel with nothing strange in it."""

import importlib
import inspect
import re
import sys
import zipfile
from pathlib import Path

import pytest

import natgrad

ROOT = Path(__file__).parents[1]


@pytest.fixture
def release(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    yield importlib.import_module("release")
    sys.modules.pop("release", None)


def test_the_version_is_said_once_more_where_python_looks(release):
    assert release.version() == natgrad.__version__


def test_every_deprecated_name_stands_in_the_changelog():
    """Under Deprecated of the newest section, with what to write instead."""
    text = (ROOT / "CHANGELOG.md").read_text()
    rows = re.search(r"^## .*?^### Deprecated\n(.*?)^##", text, re.MULTILINE | re.DOTALL)[1]
    row_of = {}
    for line in rows.splitlines():
        before, _, now = line.strip("| ").partition(" | ")
        row_of.update((name.rpartition(".")[2], now) for name in re.findall(r"`([\w.]+)=?(?:\(\))?`", before))
    for module, names in natgrad.MOVED.items():
        assert all(module.__name__ in row_of[name] for name in names)
    for old, new in natgrad.RENAMED.items():
        assert f"natgrad.{new}" in row_of[old]
    kinds = [kind for kind in vars(natgrad).values() if inspect.isclass(kind) and "__init__" in vars(kind)]
    renamed = {pair for kind in kinds for pair in getattr(kind.__init__, "renamed", {}).items()}
    assert renamed  # else this test has nothing to look at, and goes with the last old name
    assert all(f"`{new}=`" in row_of[old] for old, new in renamed)


def test_a_wheel_with_something_strange_or_missing_is_refused(release, tmp_path):
    def wheel(*names):
        path = tmp_path / "natgrad-0.1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as made:
            for name in names:
                made.writestr(name, "")
        return path

    whole = [*release.WANTED, "natgrad-0.1.0.dist-info/METADATA"]
    assert release.check_files(wheel(*whole)) == len(whole)
    with pytest.raises(SystemExit, match=r"should not be there: \['tests/conftest.py'\]"):
        release.check_files(wheel(*whole, "tests/conftest.py"))
    with pytest.raises(SystemExit, match=r"lacks: \['natgrad/py.typed'\]"):
        release.check_files(wheel(*(name for name in whole if name != "natgrad/py.typed")))


def test_a_tree_that_is_not_ready_says_why(release, monkeypatch, tmp_path):
    monkeypatch.setattr(release, "run", lambda *_, **__: " M src/natgrad/capture.py\n")
    monkeypatch.setattr(release, "version", lambda: "9.9.9")
    assert release.unready() == [
        "not committed:  M src/natgrad/capture.py",
        "CHANGELOG.md has no section '## 9.9.9': rename Unreleased, and begin a new one",
    ]


def test_make_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split()
    assert {name for name in targets if not re.search(rf"^{name}:.*  ## [.\w]", text, re.MULTILINE)} == set()
    fast = re.search(r"test_,(.*?)\)", text, re.DOTALL)[1].replace("\\\n", " ").split()
    assert [name for name in fast if not (ROOT / "tests" / f"test_{name}").exists()] == []
