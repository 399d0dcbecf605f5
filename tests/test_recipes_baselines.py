"""The baselines of NLCG's table."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from natgrad.parallel import World
from natgrad_lab.recipes import find
from natgrad_lab.train.optimizers import RmsProp, Sgd
from test_recipes_nlcg import TABLE

# The release's table: test accuracy in % of NLCG, RMSProp, momentum, SGD
PUBLISHED = {
    "128": (66.2, 64.9, 64.6, 63.7),
    "256": (68.4, 65.1, 64.9, 63.8),
    "512": (67.4, 64.8, 65.0, 63.5),
    "1k": (65.4, 64.7, 65.0, 63.5),
    "2k": (63.9, 64.5, 64.9, 63.1),
    "4k": (64.5, 65.3, 65.2, 61.8),
    "8k": (67.0, 66.0, 66.0, 55.0),
    "16k": (56.0, 37.0, 37.0, 35.0),
}
BASELINES = {
    "rmsprop": RmsProp(lr=0, decay=0.9, momentum=0.9, epsilon=1.0, weight_decay=2e-4),
    "momentum": Sgd(lr=0, momentum=0.9, weight_decay=2e-4),
    "sgd": Sgd(lr=0, momentum=0.0, weight_decay=2e-4),
}


@pytest.mark.parametrize("size", TABLE)
def test_baselines_differ_in_their_optimizer_alone_and_state_what_was_published(size):
    ours = find(f"cifar100_nlcg_{size}")()
    for kind, share in zip(("nlcg", "rmsprop", "momentum", "sgd"), PUBLISHED[size]):
        maker = find(f"cifar100_{kind}_{size}")
        assert f"published {share} %" in (maker.__doc__ or "")
        assert replace(maker(), optimizer=ours.optimizer) == ours
        if kind != "nlcg":
            assert maker().optimizer == replace(BASELINES[kind], lr=TABLE[size][1])


def test_rmsprop_is_the_gradient_over_its_root_mean_square():
    weight = nn.Parameter(torch.tensor([[2.0]]))
    model = nn.Linear(1, 1, bias=False)
    model.weight = weight
    optimizer = RmsProp(lr=0.1, decay=0.5, momentum=0.9, epsilon=1.0).build(model, World())
    square = step = 0.0
    value = 2.0
    for gradient in (1.0, 3.0):
        weight.grad = torch.tensor([[gradient]])
        optimizer.step()
        square = 0.5 * square + 0.5 * gradient**2
        step = 0.9 * step + gradient / (square**0.5 + 1.0)
        value -= 0.1 * step
        assert weight.item() == pytest.approx(value, rel=1e-6)
