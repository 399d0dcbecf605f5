"""Who takes part: an optimizer's settings, and the space that its tuning may search. One entry a contender.

Everyone's learning rate spans some two decades around what is usual, and everyone's schedule has one of three shapes
after one of two warm-ups. The first point of every search is the default: the values of the settings below.
"""

import difflib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch.optim import Optimizer

from natgrad.optim import SecondOrder, measured_change
from natgrad_lab.compare.space import Choice, LogUniform, Space, edges, points
from natgrad_lab.import_path import is_path, resolve
from natgrad_lab.schedules import Cosine, Polynomial, Schedule, WarmUp
from natgrad_lab.train.optimizers import (
    AdamW,
    Dash,
    KFac,
    Lamb,
    Lars,
    Muon,
    Nlcg,
    Seng,
    Settings,
    Sgd,
    Shampoo,
    Soap,
    SpNgd,
    anybodys,
)

Kind = Literal["first-order", "matrix", "natgrad"]
"""First-order ones set the goal; matrix ones precondition without curvature of the loss (Muon, Shampoo, SOAP, DASH)."""

SHAPES: dict[str, Schedule] = {"cosine": Cosine(), "linear": Polynomial(1.0), "quadratic": Polynomial(2.0)}
SCHEDULE: Space = {"schedule": Choice(tuple(SHAPES)), "warm_up": Choice((0.0, 0.15))}
"""Shape by which the learning rate falls to zero, and share of the run in which it rises from a tenth."""


@dataclass(frozen=True)
class Contender:
    """An optimizer, and the space of values that its tuning may try."""

    name: str
    kind: Kind
    base: Settings
    space: Space
    first: Mapping[str, Any] = field(default_factory=dict)
    """The first point's values where they are not the settings' own."""

    def all_of(self) -> Space:
        """The space with the schedule's part."""
        return {**self.space, **SCHEDULE}

    def points(self, trials: int) -> list[dict[str, Any]]:
        """Return the points to try, always the same."""
        defaults = {"schedule": "cosine", "warm_up": 0.0, **vars(self.base), **self.first}
        return points(self.all_of(), defaults, trials, seed=self.name)

    def settings(self, values: Mapping[str, Any]) -> Settings:
        """Return the optimizer's settings at a point."""
        return replace(self.base, **{name: value for name, value in values.items() if name not in SCHEDULE})

    def schedule(self, values: Mapping[str, Any]) -> Schedule:
        """Return the learning rate's schedule at a point."""
        shape = SHAPES[values["schedule"]]
        return WarmUp(shape, length=values["warm_up"], start=0.1) if values["warm_up"] else shape

    def edges(self, values: Mapping[str, Any]) -> list[str]:
        """Return the names whose chosen value lies on the edge of the space."""
        return edges(self.all_of(), values)


MOMENTUM = Choice((0.5, 0.7, 0.9, 0.95))
PENALTY = Choice((0.0, 1e-4, 1e-3, 1e-2))
DECOUPLED = Choice((0.0, 0.01, 0.1, 1.0))
BESIDE = Choice((0.0, 0.03, 0.1, 0.3))
"""Weight decay: in the gradient; on the scale of Adam's steps; beside natural gradients, on the scale of theirs."""
DAMPING = LogUniform(1e-4, 1e-1)
BETAS = Choice(((0.9, 0.999), (0.9, 0.95), (0.8, 0.95), (0.95, 0.99)))
DEFAULT_CHANGE = measured_change.limit
CURVED: Space = {
    "lr": LogUniform(0.01, 1.0),
    "largest_change": LogUniform(0.05, 1.0),
    "damping": DAMPING,
    "weight_decay": BESIDE,
}
"""Momentum stays at 0.7: beside a bound on the change it says little, and a space has as many names as others'."""
SKETCHED: Space = {
    **CURVED,
    "damping": LogUniform(1e-3, 1.0),
    "refresh": Choice((1, 4, 16)),
}
"""Damping is absolute here, beside the squares of single samples' gradients."""

CONTENDERS = (
    Contender(
        "SGD",
        "first-order",
        Sgd(lr=0.1),
        {"lr": LogUniform(0.01, 3.0), "momentum": MOMENTUM, "weight_decay": PENALTY},
    ),
    Contender(
        "Nesterov",
        "first-order",
        Sgd(lr=0.1, nesterov=True),
        {"lr": LogUniform(0.01, 3.0), "momentum": MOMENTUM, "weight_decay": PENALTY},
    ),
    Contender(
        "AdamW",
        "first-order",
        AdamW(lr=0.01),
        {"lr": LogUniform(1e-3, 0.1), "betas": BETAS, "weight_decay": DECOUPLED},
    ),
    Contender(
        "LARS",
        "first-order",
        Lars(),
        {
            "lr": LogUniform(1.0, 100.0),
            "momentum": MOMENTUM,
            "vectors": Choice((0.003, 0.01, 0.03)),
            "weight_decay": PENALTY,
        },
    ),
    Contender(
        "LAMB",
        "first-order",
        Lamb(),
        {"lr": LogUniform(2e-3, 0.2), "betas": BETAS, "weight_decay": DECOUPLED},
    ),
    Contender(
        "Muon",
        "matrix",
        Muon(),
        {
            "lr": LogUniform(5e-3, 0.5),
            "rest_lr": LogUniform(1e-3, 0.1),
            "momentum": MOMENTUM,
            "weight_decay": DECOUPLED,
        },
    ),
    Contender(
        "Shampoo",
        "matrix",
        Shampoo(),
        {
            "lr": LogUniform(0.01, 3.0),
            "betas": BETAS,
            "every": Choice((1, 5, 20)),
            "weight_decay": PENALTY,
        },
    ),
    Contender(
        "SOAP",
        "matrix",
        Soap(),
        {
            "lr": LogUniform(2e-3, 0.2),
            "betas": Choice(((0.95, 0.95), (0.9, 0.95), (0.8, 0.95), (0.95, 0.99))),
            "every": Choice((1, 3, 10)),
            "weight_decay": DECOUPLED,
        },
    ),
    Contender(
        "DASH",
        "matrix",
        Dash(),
        {
            "lr": LogUniform(1e-3, 0.1),
            "betas": BETAS,
            "every": Choice((1, 5, 20)),
            "weight_decay": DECOUPLED,
        },
    ),
    Contender(
        "SPNGD",
        "natgrad",
        SpNgd(lr=0.1, largest_change=DEFAULT_CHANGE),
        {**CURVED, "rescale": Choice((None, "always"))},
    ),
    Contender(
        "KFAC",
        "natgrad",
        KFac(lr=0.1, largest_change=DEFAULT_CHANGE),
        {**CURVED, "refresh": Choice((None, 1, 3))},
    ),
    Contender("SENG", "natgrad", Seng(lr=0.1, largest_change=DEFAULT_CHANGE), SKETCHED),
    Contender("SENG-improved", "natgrad", Seng(lr=0.1, largest_change=DEFAULT_CHANGE, columns="improved"), SKETCHED),
    Contender(
        "NLCG",
        "natgrad",
        Nlcg(lr=0.25),
        {
            "lr": LogUniform(0.02, 2.0),
            "beta": Choice(("fletcher_reeves", "polak_ribiere", "dai_yuan")),
            "feedback": Choice(("step", "online", None)),
            "weight_decay": PENALTY,
        },
    ),
    Contender(
        "NLCG-K-FAC",
        "natgrad",
        Nlcg(lr=1.0, preconditioner="kronecker", beta="polak_ribiere", step="curvature", fisher="sampled"),
        {
            "lr": LogUniform(0.1, 1.0),
            "damping": DAMPING,
            "refresh": Choice((1, 2, 5)),
            "beta": Choice(("fletcher_reeves", "polak_ribiere", "dai_yuan")),
            "weight_decay": PENALTY,
        },
    ),
)


def anybodys_contender(path: str) -> Contender:
    """Return what package.module:NAME or ./file.py:NAME stands for: a Contender, settings, or a class of optimizers.

    Settings and classes are tuned in their learning rate alone, over two decades around their own. A class counts among
    the first-order ones where it does not derive from natgrad's.
    """
    found, name = resolve(path), path.rpartition(":")[2]
    if isinstance(found, Contender):
        return found
    if isinstance(found, type) and issubclass(found, Settings):
        found = found()
    kind: Kind = "first-order"
    if isinstance(found, type) and issubclass(found, Optimizer):
        kind = "natgrad" if issubclass(found, SecondOrder) else kind
        found = anybodys(path)
    if not isinstance(found, Settings):
        raise ValueError(f"{path} is no contender; name a Contender, a class of optimizers, or the settings of one")
    return Contender(name, kind, found, {"lr": LogUniform(found.lr / 10, found.lr * 10)})


def chosen(names: tuple[str, ...]) -> tuple[Contender, ...]:
    """Return the contenders of these names, written in any case, in the order of the list; all where none is named.

    Anybody's, given by import paths, come last.
    """
    others = tuple(anybodys_contender(name) for name in dict.fromkeys(names) if is_path(name))
    names = tuple(name for name in names if not is_path(name))
    taken = Counter(one.name.lower() for one in (*CONTENDERS, *others))
    for one in others:
        if taken[one.name.lower()] > 1:
            raise ValueError(f"two optimizers are called {one.name}; give yours another name")
    if others and not names:
        return others
    return _ours(names) + others


def _ours(names: tuple[str, ...]) -> tuple[Contender, ...]:
    known = {contender.name.lower(): contender for contender in CONTENDERS}
    for name in names:
        if name.lower() not in known:
            near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
            hint = f"did you mean {known[near[0]].name}?" if near else ""
            listed = ", ".join(contender.name for contender in CONTENDERS)
            raise ValueError(f"there is no optimizer {name!r}; {hint or f'choose among {listed}'}")
    wanted = {name.lower() for name in names}
    return tuple(one for lower, one in known.items() if not wanted or lower in wanted)
