"""What NLCG can be told, checked: what cannot be, or cannot be together, is refused in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from natgrad.optim import validation
from natgrad.optim.betas import fletcher_reeves, polak_ribiere
from natgrad.optim.diagonal_metrics import DiagonalBFGS, Metric
from natgrad.optim.line_search import CurvatureStep, Scheduled
from natgrad.optim.seng import SampleBlocks

OF_CURVATURE = {
    "damping": 1e-2,
    "refresh": 1,
    "rows_per_dim": 8,
    "ema_decay": 0.9,
    "fisher": "empirical",
    "max_size": 8192,
}
ALSO_OF_CURVATURE = {"seed", "strict", "predictions", "batch_dim"}
REFUSED = {
    "momentum": "beta says how much of the last direction is kept",
    "fallback": "all parameters are in its inner products, those without curvature undamped and uncurved",
    "length": "one step size serves all parameters; see step=",
    "rule": "its rule is conjugate gradients; see beta=",
    "curvature": "a curvature is a preconditioner here: preconditioner=spngd_blocks",
    "rescale": "its directions repeat what rescaling would undo",
    "gather": "step= decides what travels",
}


def check_choices(
    metric: Any,
    beta: Any,
    beta_max: float,
    step: Any,
    mode: str,
    prescale: float | None,
    shared: Mapping[str, Any],
) -> None:
    """What cannot be, or cannot be together, in one line."""
    if isinstance(metric, Metric):
        for name in sorted(shared.keys() & (OF_CURVATURE.keys() | ALSO_OF_CURVATURE)):
            raise ValueError(
                f"{name}={shared[name]!r} says nothing to {metric.name}: it belongs to a curvature, as in "
                "NLCG(model, preconditioner=spngd_blocks)"
            )
    elif not callable(metric):
        raise ValueError(f"preconditioner={metric!r}: give DiagonalBFGS(), SecondMoment(), None or blocks of curvature")
    if isinstance(metric, SampleBlocks) and "rows_per_dim" in shared:
        raise ValueError(
            f"rows_per_dim={shared['rows_per_dim']!r} says nothing to columns of samples: give SampleSpace(samples=...)"
        )
    if isinstance(metric, SampleBlocks) and (metric.space.columns, metric.space.block) != ("empirical", "layer"):
        raise ValueError(f'preconditioner={metric}: NLCG takes columns="empirical" and block="layer"')
    validation.one_of("mode", mode, ("hardened", "faithful"))
    if not isinstance(step, (Scheduled, CurvatureStep)):
        raise ValueError(f"step={step!r}: give Scheduled() or CurvatureStep()")
    if not callable(beta):
        raise ValueError(f"beta={beta!r}: give fletcher_reeves, another beta or a function of Products")
    if not (isinstance(beta_max, (int, float)) and beta_max >= 0) or math.isnan(beta_max):
        raise ValueError(f"beta_max={beta_max!r}: give a number of at least 0; inf for no limit")
    if prescale is not None:
        validation.above("prescale", prescale, 0)
    released = metric in (DiagonalBFGS(), Metric()) and beta in (fletcher_reeves, polak_ribiere)
    if mode == "faithful" and not (released and isinstance(step, Scheduled) and beta_max == 1):
        raise ValueError(
            'mode="faithful" is the release: DiagonalBFGS() or None, fletcher_reeves or polak_ribiere, beta_max=1 and '
            'Scheduled(); for other choices take mode="hardened"'
        )
