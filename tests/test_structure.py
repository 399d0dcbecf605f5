"""The structure check finds what it should, and this tree has nothing to find."""

import structure


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_circles_are_found_type_checking_included(tmp_path):
    write(
        tmp_path,
        {
            "p/__init__.py": "from p.a import x\n",
            "p/a.py": "import p.b\n",
            "p/b.py": "try:\n    from . import c\nexcept ImportError:\n    pass\n",
            "p/c.py": "x = 1\n",
            "p/d.py": "def f():\n    from p import e\n",
            "p/e.py": "from p import d\n",
        },
    )
    assert structure.cycles(structure.import_graph(tmp_path)) == []
    for text in ("from .a import y\n", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p import a\n"):
        write(tmp_path, {"p/c.py": text})
        assert structure.cycles(structure.import_graph(tmp_path)) == [["p.a", "p.b", "p.c", "p.a"]]


def test_this_tree_is_in_order(capsys):
    circles = structure.cycles(structure.import_graph(structure.ROOT / "src"))
    assert circles == []


def test_homonyms_are_found(tmp_path):
    write(
        tmp_path,
        {
            "p/__init__.py": "",
            "p/a/step.py": "class One: pass\nclass _Own: pass\n",
            "p/b/step.py": "class _Own: pass\n",
            "p/b/other.py": "class One: pass\n",
            "q/step.py": "class One: pass\n",
        },
    )
    found = structure.homonyms(structure.inside(tmp_path, "p"), tmp_path)
    assert found == [
        "two files are called step.py: p/a/step.py, p/b/step.py",
        "two classes are called One: p/a/step.py, p/b/other.py",
    ]


def test_files_that_a_page_names_exist(tmp_path):
    write(tmp_path, {"page.md": "`a/b.py`, `b.py`, `c.py`, `x/b.py` and b.py\n"})
    found = structure.missing([tmp_path / "page.md"], [tmp_path / "a" / "b.py"])
    assert found == ["page.md names c.py, which does not exist", "page.md names x/b.py, which does not exist"]
