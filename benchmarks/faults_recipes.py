"""The runs that the fault campaign disturbs: every optimizer, with all that a checkpoint has to keep, in a second."""

from __future__ import annotations

from natgrad_lab.data import Digits, Regularisation
from natgrad_lab.models import Architecture, CifarResNet, Mlp
from natgrad_lab.train.optimizers import AdamW, KFac, Nlcg, Seng, Settings, SpNgd
from natgrad_lab.train.recipe import Recipe

STEPS = 12


def spngd() -> Recipe:
    """SP-NGD, statistics measured when they have changed."""
    return _run(SpNgd(lr=0.05, refresh=None, ema_decay=0.5, rescale="always", coefficient="tied", displaced=True))


def budget() -> Recipe:
    """SP-NGD under a budget, so that some statistics always wait."""
    return _run(SpNgd(lr=0.05, refresh=1, refresh_share=0.1))


def kfac() -> Recipe:
    """K-FAC by eigenvectors on a network with running statistics; owners send directions."""
    return _run(KFac(lr=0.05, refresh=2, inverse="eigen", gather="directions"), CifarResNet(8, (2, 4, 4)))


def seng() -> Recipe:
    """SENG, whose statistics are rows of samples."""
    return _run(Seng(lr=0.1, refresh=3, samples=40))


def nlcg() -> Recipe:
    """NLCG with the diagonal BFGS, which listens to the loss."""
    return _run(Nlcg(lr=0.1))


def nlcg_kfac() -> Recipe:
    """NLCG with K-FAC as preconditioner and the curvature step."""
    return _run(Nlcg(lr=1.0, preconditioner="kronecker", step="curvature", beta="polak_ribiere"))


def adamw() -> Recipe:
    """AdamW, which knows nothing of ranks: the trainer averages its gradients."""
    return _run(AdamW())


RECIPES = {f.__name__: f for f in (spngd, budget, kfac, seng, nlcg, nlcg_kfac, adamw)}


def _run(optimizer: Settings, model: Architecture = Mlp((12,))) -> Recipe:  # noqa: B008  (frozen)
    blended = Regularisation(mixup=0.4, erase=0.5, per_sample=True)
    return Recipe(
        Digits(),
        model,
        optimizer,
        regularisation=blended,
        average=0.9,
        batch=60,
        steps=STEPS,
        evaluate_every=8,
        norm_samples=64,
    )
