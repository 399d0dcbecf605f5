"""constraints.txt pins all that the extras stand on, and nothing has an upper bound that is not needed."""

import pytest
from packaging.requirements import Requirement

import constraints


def test_all_that_is_installed_here_for_the_extras_is_pinned():
    if constraints.installed("natgrad") is None:
        pytest.skip("natgrad is not installed, so its requirements are not known")
    missing = constraints.closure().keys() - constraints.pinned().keys()
    assert not missing, "python tests/constraints.py"


def test_every_line_pins_one_version():
    for line in constraints.pinned().values():
        assert [spec.operator for spec in Requirement(line).specifier] == ["=="], line


def test_requirements_are_lower_bounds():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    project = tomllib.loads((constraints.ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for own in project["optional-dependencies"].values() for text in own)]
    for text in texts:
        assert all(spec.operator == ">=" for spec in Requirement(text).specifier), text
