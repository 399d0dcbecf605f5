"""Who takes part in benchmarks/lengths.py: choices of length and momentum, each with a grid of 12 points."""

from __future__ import annotations

from typing import Any

from grid import Contender

from natgrad.train.optimizers import AdamW, KFac, Sgd, SpNgd
from natgrad.train.optimizers.curved import LENGTHS

DAMPINGS = (1e-4, 1e-3, 1e-2)
BEST: tuple[Any, bool] = ("predicted_change", False)  # tried further, and as K-FAC
PLAIN: tuple[Any, bool] = ("plain", False)


def contenders(task: str) -> list[Contender]:
    """The six choices of SP-NGD, two that users would pick, and the best choice rescaled and as K-FAC.

    On digits, where a trial takes a second, also another limit of the predicted change and the plain K-FAC.
    """
    digits = task == "digits"
    small = {"lr": (0.003, 0.01, 0.03, 0.1) if digits else (0.01, 0.03, 0.1, 0.3), "damping": DAMPINGS}
    large = {"lr": (0.01, 0.03, 0.1, 0.3), "damping": DAMPINGS}
    choices: list[tuple[Any, bool]] = [(length, before) for length in LENGTHS for before in (False, True)]
    limits = {"lr": (0.03, 0.1, 0.3), "largest_change": (1e-3, 3e-3, 3e-2, 1e-1)}
    kfacs = (BEST, PLAIN) if digits else (BEST,)
    return [
        *(Contender(title(*one), spngd(one), large if one[0] == "trust" else small) for one in choices),
        *users(),
        Contender(f"{title(*BEST)}, rescaled", spngd(BEST, rescale="always"), small),
        *(Contender(f"K-FAC {title(*one)}", kfac(one, 2 if digits else 10), small) for one in kfacs),
        *([Contender("predicted change of another limit", SpNgd(length=BEST[0]), limits)] if digits else []),
    ]


def users() -> list[Contender]:
    """What would be picked instead."""
    betas = ((0.9, 0.999), (0.9, 0.99), (0.8, 0.95))
    return [
        Contender("SGD, Nesterov", Sgd(nesterov=True), {"lr": (0.03, 0.1, 0.3, 1.0), "momentum": (0.8, 0.9, 0.95)}),
        Contender("AdamW", AdamW(), {"lr": (0.001, 0.003, 0.01, 0.03), "betas": betas}),
    ]


def spngd(choice: tuple[Any, bool], rescale: Any = None) -> SpNgd:
    return SpNgd(length=choice[0], before=choice[1], rescale=rescale)


def kfac(choice: tuple[Any, bool], refresh: int) -> KFac:
    return KFac(length=choice[0], before=choice[1], refresh=refresh, norms="unitwise")


def title(length: str, before: bool) -> str:
    return f"{length.replace('_', ' ')}, momentum {'before' if before else 'after'}"
