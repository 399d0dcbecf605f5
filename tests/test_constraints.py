"""constraints.txt pins all that the extras stand on, constraints-lowest.txt the lower bounds; CI tests with both."""

import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import constraints

LOWEST = constraints.ROOT / "constraints-lowest.txt"
WORKFLOWS = sorted((constraints.ROOT / ".github" / "workflows").glob("*.yml"))
INDIRECT = {"pyarrow"}
"""What is not the project's own requirement, and has to be old where NumPy is."""
CI = [constraints.ROOT / ".ci" / "run", *WORKFLOWS]


def project():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    return tomllib.loads((constraints.ROOT / "pyproject.toml").read_text())["project"]


def requirements():
    own = project()
    texts = [*own["dependencies"], *(text for extra in own["optional-dependencies"].values() for text in extra)]
    return {canonicalize_name(one.name): one for one in map(Requirement, texts) if one.name != constraints.OURS}


def test_all_that_is_installed_here_for_the_extras_is_pinned():
    if constraints.installed("natgrad") is None:
        pytest.skip("natgrad is not installed, so its requirements are not known")
    missing = constraints.closure().keys() - constraints.pinned().keys()
    assert not missing, "python tests/constraints.py"


@pytest.mark.parametrize("file", [constraints.FILE, LOWEST], ids=lambda file: file.name)
def test_every_line_pins_one_version(file):
    for line in constraints.pinned(file).values():
        assert [spec.operator for spec in Requirement(line).specifier] == ["=="], line


def test_requirements_are_lower_bounds():
    for requirement in requirements().values():
        assert [spec.operator for spec in requirement.specifier] == [">="], requirement


def test_the_lowest_versions_are_those_of_the_project():
    lowest = {name: Requirement(line).specifier for name, line in constraints.pinned(LOWEST).items()}
    wanted = requirements()
    assert lowest.keys() == wanted.keys() | INDIRECT
    for name, requirement in wanted.items():
        ((bound,), (pin,)) = requirement.specifier, lowest[name]
        assert Version(pin.version) == Version(bound.version), f"{requirement}, but {LOWEST.name} has {pin}"


def test_the_pinned_versions_are_allowed():
    pinned = constraints.pinned()
    for name, requirement in requirements().items():
        if name in pinned:
            (pin,) = Requirement(pinned[name]).specifier
            assert requirement.specifier.contains(pin.version), f"{requirement}, but {constraints.FILE.name} has {pin}"


def targets():
    """What the Makefile can make, with the lines of each."""
    text = (constraints.ROOT / "Makefile").read_text()
    return {m[1]: m[0] for m in re.finditer(r"^(\S+):(?!=).*(?:\n\t.*)*", text.replace("$(VENV)", ".venv"), re.M)}


@pytest.mark.parametrize("file", CI, ids=lambda file: file.name)
def test_ci_calls_what_the_makefile_has_and_names_no_version_itself(file):
    text = file.read_text()
    called = [word for line in re.findall(r"\bmake ([^;&|>}\n]+)", text) for word in line.split()]
    called = [word for word in called if "=" not in word and not word.startswith("-")]
    assert called
    assert set(called) <= targets().keys()
    assert not re.search(r"(torch|numpy)\W{0,2}[=<>~]=", text)


def test_ci_tests_the_lowest_and_the_newest_versions():
    made = targets()
    assert "--constraint constraints-lowest.txt" in made[".venv-lowest/.ready"]
    assert "constraint" not in made[".venv-newest/.ready"]
    assert ".venv-lowest/.ready" in made["test-lowest"]
    assert ".venv-newest/.ready" in made["test-newest"]
    yaml = pytest.importorskip("yaml")
    ((workflow,),) = ([yaml.safe_load(file.read_text()) for file in WORKFLOWS],)
    rows = {row["versions"]: row for row in workflow["jobs"]["suite"]["strategy"]["matrix"]["include"]}
    assert rows["lowest"]["command"] == "make test-lowest LOWEST_TESTS=tests"
    assert rows["newest"]["command"] == "make test-newest"
    assert f">={rows['lowest']['python']}" == project()["requires-python"]
    assert "make test-lowest" in (constraints.ROOT / ".ci" / "run").read_text()
