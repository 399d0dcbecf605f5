"""How good a model is on some images, over all ranks, each judging its share.

BatchNorm judges with running averages, which lag behind the weights by some hundred steps: in a short run
they spoil every figure. So `estimate_norms` measures them anew, at the present weights, from training data,
before a model is judged; the estimates stay in the model, as its running averages would. `average_norms` keeps
the running averages, which every rank has of its own shares, and makes them one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from natgrad.parallel import World
from natgrad_lab.data import Images, read_ahead
from natgrad_lab.data.sampler import alike

CHUNK = 1024
"""Images judged at a time at most: bounds memory, and changes no result but for BatchNorm's estimates."""


@dataclass(frozen=True)
class Score:
    """Means over all images."""

    loss: float
    accuracy: float


Tick = Callable[[float], None]
"""Told which share of an evaluation is done."""


def quietly(share: float) -> None:
    """Tell nobody."""


def evaluate(model: nn.Module, images: Images, world: World, chunk: int = CHUNK, tick: Tick = quietly) -> Score:
    """Return loss (cross-entropy) and accuracy over all images (of texts: all places), the model in evaluation mode."""
    total = torch.zeros(3, dtype=torch.float64)
    share = alike(_share(len(images), world), chunk, -(-len(images) // world.size))
    images = read_ahead(images, share)
    with _mode(model, training=False), torch.no_grad():
        for done, index in enumerate(share):
            tick(done / len(share))
            inputs, labels = images.batch(index)
            logits, labels = model(inputs).float().flatten(0, -2), labels.flatten()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            right = (logits.argmax(dim=1) == labels).sum()
            total += torch.stack((loss.double(), right.double(), torch.ones_like(loss).double() * len(labels))).cpu()
    total = total.to(torch.float32 if images.device.type == "mps" else torch.float64).to(images.device)
    world.sum([total])
    loss, right, count = total.tolist()
    return Score(loss / count, right / count)


def estimate_norms(model: nn.Module, images: Images, world: World, samples: int = 4096, chunk: int = CHUNK) -> None:
    """Replace every BatchNorm's running averages by those of `samples` training images at the present
    weights.

    Each rank passes its share through the model in training mode; what is kept is the mean over its batches
    and then over ranks.
    """
    norms = [module for module in model.modules() if isinstance(module, BatchNorm) and module.track_running_stats]
    if not norms:
        return
    places = torch.linspace(0, len(images) - 1, min(samples, len(images))).long()
    share = alike(places[_share(len(places), world)], chunk, -(-len(places) // world.size))
    images = read_ahead(images, share)
    with _mode(model, training=True), _plain_average(norms), torch.no_grad():
        for index in share:
            model(images.batch(index)[0])
    world.mean([value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None])


def average_norms(model: nn.Module, world: World) -> None:
    """Replace every BatchNorm's running averages by those of all ranks' data taken together.

    By the law of total variance: mean = E[mean_r], var = E[var_r] + Var[mean_r], over ranks of equal weight. The
    second term counts where ranks see unlike data. Shares of one permutation are alike: there it is noise of
    the running means, below var / (19 n) for n independent samples in a rank's part and momentum 0.1.
    """
    norms = [norm for norm in model.modules() if isinstance(norm, BatchNorm) and norm.running_mean is not None]
    means = [norm.running_mean for norm in norms if norm.running_mean is not None]
    own = [mean.clone() for mean in means]
    world.mean(means)
    spread = [(before - mean).square() for before, mean in zip(own, means)]
    variances = [norm.running_var for norm in norms if norm.running_var is not None]
    for variance, extra in zip(variances, spread):
        variance.add_(extra)
    world.mean(variances)


def _share(count: int, world: World) -> Tensor:
    """Return every size-th place, beginning at the rank's own."""
    return torch.arange(world.rank, count, world.size)


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put all modules in one mode, and each back to its own afterwards."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextmanager
def _plain_average(norms: list[BatchNorm]) -> Iterator[None]:
    """Start the running averages afresh and let every batch count the same (momentum None in torch)."""
    before = {norm: norm.momentum for norm in norms}
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    try:
        yield
    finally:
        for norm, momentum in before.items():
            norm.momentum = momentum
