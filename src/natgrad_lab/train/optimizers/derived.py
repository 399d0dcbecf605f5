"""Settings that follow from an optimizer: what a field's default is, and what it means, is said where its argument is.

    @dataclass(frozen=True)
    class SpNgd(Curved, of=natgrad.SPNGD):
        momentum: float = argument()                                # SPNGD(momentum=)
        before: bool = argument(Momentum)                           # SPNGD(rule=Momentum(before=))
        widen_below: int = argument(Adaptive, "at")                 # SPNGD(refresh=Adaptive(at=))
        wire: Literal["bfloat16"] | None = argument(World, choices=DTYPES)

Names and types are declared, for readers and type checkers. tests/test_settings_derived.py compares the types with
those of the arguments, and finds arguments that are no field and have no reason in `left_out`.
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from natgrad.optim import SecondOrder
from natgrad.parallel import World
from natgrad_lab.docstrings import words
from natgrad_lab.train.optimizers.settings import Settings

SAME = object()
"""The default of a field whose default is that of its argument."""
ORIGIN = "argument"
Reasons = Mapping[str, str]


@dataclass(frozen=True)
class Origin:
    """The argument that a field stands for."""

    part: type | None
    """The class of an object that the optimizer is given, such as Momentum; None: the optimizer itself."""
    name: str
    """The argument's name, where the field has another one."""
    choices: Mapping[Any, Any] | None
    """What the values of the field stand for; None: for themselves."""
    default: Any
    """The field's default, where it is not the argument's."""
    note: str
    """What is said of the field beside what is said of the argument."""

    def default_of(self, optimizer: type, name: str) -> Any:
        """The default of the argument: of an object that is itself a default, what that object has."""
        known = inspect.signature(optimizer).parameters
        if self.part is None:
            default = known[name].default
        else:
            whole = next((one.default for one in known.values() if isinstance(one.default, self.part)), None)
            default = inspect.signature(self.part).parameters[name].default if whole is None else getattr(whole, name)
        return default if self.choices is None else name_of(default, self.choices)


def argument(
    part: type | None = None,
    name: str = "",
    *,
    choices: Mapping[Any, Any] | None = None,
    default: Any = SAME,
    note: str = "",
) -> Any:
    """A field that stands for an argument of the optimizer, or of a part of it; see Origin."""
    return field(default=SAME, metadata={ORIGIN: Origin(part, name, choices, default, note)})


def name_of(value: Any, choices: Mapping[Any, Any]) -> Any:
    """The name of a choice: of the object itself, or of its class."""
    return next(name for name, one in choices.items() if one == value or one is type(value))


@dataclass(frozen=True)
class Derived(Settings):
    """Settings of an optimizer of ours; `class Name(Derived, of=Optimizer)` fills in what its arguments say."""

    makes: ClassVar[type[SecondOrder]]
    """The optimizer's class."""
    left_out: ClassVar[Reasons] = {}
    """Arguments that are no field, such as "scaler" or "World.group", and why. Those of base classes count too."""

    def __init_subclass__(cls, of: type[SecondOrder] | None = None, **more: Any) -> None:
        super().__init_subclass__(**more)
        if of is None:
            return
        cls.makes = of
        types, said = {}, [inspect.cleandoc(cls.__doc__ or ""), "", "Args:"]
        for name, kind, origin in declared(cls):
            theirs, whole = origin.name or name, origin.part or of
            if theirs not in inspect.signature(whole).parameters:
                raise TypeError(f"{cls.__name__}.{name}: {whole.__name__} has no argument {theirs!r}")
            default = origin.default_of(of, theirs) if origin.default is SAME else origin.default
            setattr(cls, name, field(default=default, metadata={ORIGIN: origin}))
            types[name] = kind
            said.append(f"    {name}: {words(whole).get(theirs, '')} {origin.note}".rstrip())
        cls.__annotations__ = {**types, **inspect.get_annotations(cls)}
        cls.__doc__ = "\n".join([*said, ""])

    def build(self, model: nn.Module, world: World) -> Optimizer:
        return self.makes(model, self.lr, **self.arguments(world))  # type: ignore[call-arg]

    def arguments(self, world: World) -> dict[str, Any]:
        """What the optimizer is called with, beside the model and the learning rate."""
        return self.given()

    def given(self, part: type | None = None) -> dict[str, Any]:
        """What the fields say to the optimizer, or to a part of it, by the names of the arguments."""
        found = {}
        for name, _, origin in declared(type(self)):
            if origin.part is part:
                found[origin.name or name] = self._meant(name, origin)
        return found

    def _meant(self, name: str, origin: Origin) -> Any:
        value = getattr(self, name)
        if origin.choices is None:
            return value
        if value not in origin.choices:
            flag = f"--optimizer.{name.replace('_', '-')}"
            raise ValueError(f"{name}={value!r} is unknown; set {flag} to one of {', '.join(map(str, origin.choices))}")
        return origin.choices[value]

    def changed(self, *names: str) -> str | None:
        """The first of these fields that is not as it is by default."""
        usual = {entry.name: entry.default for entry in fields(self)}
        return next((name for name in names if getattr(self, name) != usual[name]), None)


def declared(kind: type) -> Iterator[tuple[str, Any, Origin]]:
    """Every field of a class that stands for an argument: its name, its type and the argument."""
    found: dict[str, tuple[Any, Origin]] = {}
    for base in reversed(kind.__mro__):
        for name, hint in inspect.get_annotations(base).items():
            entry = base.__dict__.get("__dataclass_fields__", {}).get(name, vars(base).get(name))
            if isinstance(entry, Field) and ORIGIN in entry.metadata:
                found[name] = hint, entry.metadata[ORIGIN]
            else:  # a field of the settings' own in its place
                found.pop(name, None)
    return ((name, hint, origin) for name, (hint, origin) in found.items())
