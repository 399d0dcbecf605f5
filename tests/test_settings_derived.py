"""Settings follow from signatures: every argument is a field or has a reason, with the argument's type and default."""

import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from torch import nn

import natgrad
from natgrad.parallel import World
from natgrad_lab.docstrings import entries, words
from natgrad_lab.recipes import find
from natgrad_lab.train.arguments import Training, parse
from natgrad_lab.train.optimizers import OPTIMIZERS, SpNgd
from natgrad_lab.train.optimizers.composed import Directions
from natgrad_lab.train.optimizers.derived import SAME, Derived, argument, declared

DERIVED = [kind for kind in OPTIMIZERS.values() if issubclass(kind, Derived)]
every_kind = pytest.mark.parametrize("kind", DERIVED, ids=lambda kind: kind.__name__)


def arguments_of(whole: Any) -> dict[str, inspect.Parameter]:
    return {name: one for name, one in inspect.signature(whole).parameters.items() if name not in ("model", "lr")}


def undecided(kind: type[Derived]) -> Iterator[str]:
    """Where to decide about each argument that is neither a field nor left out, and reasons for nothing."""
    reasons = {name: why for base in kind.__mro__ for name, why in vars(base).get("left_out", {}).items()}
    known = {(origin.part, origin.name or name) for name, _, origin in declared(kind)}
    known |= {(None, name) for name in kind().arguments(World())}
    wholes = [None, *dict.fromkeys(part for part, _ in known if part is not None)]
    told = set()
    for part in wholes:
        prefix = "" if part is None else f"{part.__name__}."
        for name, one in arguments_of(part or kind.makes).items():
            told.add(prefix + name)
            if (part, name) not in known and prefix + name not in reasons:
                field = f"{name}: {one.annotation} = argument({'' if part is None else part.__name__})"
                yield (
                    f"{(part or kind.makes).__name__}({name}=) is new to natgrad_lab's {kind.__name__}: add the field "
                    f"`{field}` in {inspect.getsourcefile(kind)}, or say in its left_out why {prefix + name!r} is none"
                )
    for name in vars(kind).get("left_out", {}):
        if name not in told:
            yield f"{kind.__name__}.left_out has {name!r}, which is no argument"


def members(hint: Any) -> set[Any]:
    """What a type consists of: the values of literals, the members of unions."""
    if get_origin(hint) in (Union, types.UnionType):
        return {one for part in get_args(hint) for one in members(part)}
    return set(get_args(hint)) if get_origin(hint) is Literal else {hint}


def type_of(whole: Any, name: str) -> set[Any]:
    hint = inspect.signature(whole).parameters[name].annotation
    if isinstance(hint, str):
        hint = eval(hint, inspect.unwrap(whole.__init__).__globals__)
    return members(hint)


@every_kind
def test_every_argument_is_a_field_or_has_a_reason(kind):
    assert list(undecided(kind)) == []


@every_kind
def test_fields_have_the_types_of_their_arguments(kind):
    for name, hint, origin in declared(kind):
        mine, theirs = members(hint), type_of(origin.part or kind.makes, origin.name or name)
        if origin.choices is not None:
            assert {one for one in mine if one is not types.NoneType} == set(origin.choices) - {None}, name
            assert (types.NoneType in mine) == (None in origin.choices), name
        else:  # objects are made of other fields
            plain = {one for one in theirs if one in (bool, int, float, types.NoneType) or not isinstance(one, type)}
            assert mine - {types.NoneType} == plain - {types.NoneType}, name
            if origin.default is SAME:
                assert (types.NoneType in mine) == (types.NoneType in plain), name


@every_kind
def test_every_field_has_words_and_a_default(kind):
    for name, _, origin in declared(kind):
        told = words(kind)[name]
        theirs = words(origin.part or kind.makes)[origin.name or name]
        assert told.startswith(theirs)
        assert len(theirs) > 10, name
    assert all(entry.default is not SAME for entry in fields(kind))


@pytest.mark.parametrize("kind", [natgrad.SPNGD, natgrad.KFAC, natgrad.SENG, natgrad.NLCG, natgrad.Preconditioner])
def test_docstrings_have_every_argument_of_a_signature(kind):
    assert words(kind).keys() == inspect.signature(kind).parameters.keys()
    assert entries(kind).keys() <= inspect.signature(kind).parameters.keys()


class Nudged(natgrad.SPNGD):
    """SP-NGD with an argument more.

    Args:
        nudge: how much is added to nothing.

    """

    def __init__(self, model, lr, *, nudge: float = 0.5, **shared):
        super().__init__(model, lr, **shared)
        self.nudge = nudge


def test_a_new_argument_asks_where_it_belongs():
    @dataclass(frozen=True)
    class Forgot(SpNgd, of=Nudged):
        """Settings that do not know of the argument."""

    (line,) = undecided(Forgot)
    assert line.startswith("Nudged(nudge=) is new to natgrad_lab's Forgot: add the field `nudge: <class 'float'> =")
    assert "test_settings_derived.py" in line


@dataclass(frozen=True)
class OfNudged(SpNgd, of=Nudged):
    """Settings that do."""

    nudge: float = argument()


def test_a_field_for_it_has_its_default_its_words_and_its_flag(capsys):
    assert OfNudged().nudge == 0.5
    assert OfNudged(nudge=0.25).build(nn.Linear(2, 2), World()).nudge == 0.25
    base = find("digits_spngd")()
    path = f"{__file__}:OfNudged"
    with pytest.raises(SystemExit):
        parse(Training(base), "natgrad train x", "", ["--optimizer", path, "--help"])
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--optimizer.nudge FLOAT How much is added to nothing. (default: 0.5)" in told
    assert "--optimizer.momentum FLOAT Share of the last direction that is repeated, in [0, 1). (default: 0.7)" in told


def test_a_field_that_is_no_argument_is_refused():
    with pytest.raises(TypeError, match=r"Misspelt\.momentun: SPNGD has no argument 'momentun'"):

        class Misspelt(Directions, of=natgrad.SPNGD):
            momentun: float = argument()
