"""The structure check finds what it should, and this tree has nothing to find."""

import structure


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_circles_are_found_and_type_checking_is_not_one(tmp_path):
    write(
        tmp_path,
        {
            "p/__init__.py": "from p.a import x\n",
            "p/a.py": "import p.b\n",
            "p/b.py": "try:\n    from . import c\nexcept ImportError:\n    pass\n",
            "p/c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p import a\n",
            "p/d.py": "def f():\n    from p import e\n",
            "p/e.py": "from p import d\n",
        },
    )
    assert structure.cycles(structure.import_graph(tmp_path)) == []
    write(tmp_path, {"p/c.py": "from .a import y\n"})
    assert structure.cycles(structure.import_graph(tmp_path)) == [["p.a", "p.b", "p.c", "p.a"]]


def test_this_tree_is_in_order(capsys):
    circles = structure.cycles(structure.import_graph(structure.ROOT / "src"))
    assert circles == []
