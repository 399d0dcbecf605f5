"""Saving and loading: exact, checked, on any number of ranks, and never a step."""

import io

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (  # noqa: TID251  (what trainers call)
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional as F
from torch.testing import assert_close

import natgrad
from helpers import OPTIMIZERS, Mixed, Net, backward, clone, made, mlp, points, quiet, train, weights
from multi import SAME, share
from natgrad.parallel import run_threads

every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda o: o.__name__)


def disk(saved):
    """What torch.save and torch.load make of it."""
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def by_state_dict(model, opt, new_model, new):
    new.load_state_dict(disk(opt.state_dict()))


def by_checkpoint(model, opt, new_model, new):
    saved = disk(get_optimizer_state_dict(model, opt))
    before = weights(new_model)
    get_optimizer_state_dict(new_model, new)
    set_optimizer_state_dict(new_model, new, saved)
    assert torch.equal(weights(new_model), before)


def batches(dtype, first, count):
    for k in range(first, first + count):
        yield Mixed.batch(16, k) if dtype is None else points(16, k, dtype)


@pytest.mark.parametrize("carry", [by_state_dict, by_checkpoint])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=["mixed", "float", "bf16"])
@every_optimizer
def test_a_resumed_run_is_the_same_run(kind, dtype, carry):
    def build(model):
        # nothing is alike: intervals, damping, an averaged statistic, weight decay and a lr that changes
        return made(
            kind,
            model,
            lr=0.05,
            damping=0.02,
            weight_decay=0.01,
            ema_decay=0.5,
            refresh=natgrad.Adaptive(0.5),
            rows_per_dim=2,
        )

    model = Mixed() if dtype is None else mlp().to(dtype)
    opt = build(model)
    train(opt, model, batches(dtype, 0, 4))
    opt.param_groups[0]["lr"] = 0.02
    train(opt, model, batches(dtype, 4, 1))
    torch.manual_seed(99)
    copy = clone(model)
    new = build(copy)
    carry(model, opt, copy, new)
    assert new.param_groups[0]["lr"] == 0.02
    assert new.intervals() == opt.intervals()
    for p, q in zip(model.parameters(), copy.parameters()):
        assert opt.state[p].keys() == new.state[q].keys()
        for key, value in opt.state[p].items():
            assert new.state[q][key].dtype == value.dtype, key
            assert torch.equal(new.state[q][key], value), key
    for k in range(5):
        losses = [train(o, m, batches(dtype, 5 + k, 1)) for o, m in ((opt, model), (new, copy))]
        assert losses[0] == losses[1]
        assert torch.equal(weights(model), weights(copy))


def test_loading_shares_nothing_with_what_was_loaded():
    model, other = mlp(), mlp()
    opt, new = natgrad.SPNGD(model, lr=0.1), natgrad.SPNGD(other, lr=0.1)
    train(opt, model, [points(8, 0)])
    saved = opt.state_dict()
    new.load_state_dict(saved)
    before = [v.clone() for s in saved["state"].values() for v in s.values()]
    train(new, other, [points(8, k) for k in range(3)])
    assert all(torch.equal(v, b) for v, b in zip((v for s in saved["state"].values() for v in s.values()), before))


def behind():
    class Behind(nn.Module):
        """The second layer's weight is changed before its use."""

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return F.linear(torch.tanh(self.first(x)), torch.tanh(self.second.weight), self.second.bias)

    return Behind()


def test_resuming_a_model_with_a_layer_that_is_used_otherwise():
    model = behind()
    opt = natgrad.SPNGD(model, lr=0.05)
    quiet(train, opt, model, [points(16, k) for k in range(3)])
    copy = clone(model)
    new = natgrad.SPNGD(copy, lr=0.05)
    quiet(new.load_state_dict, disk(opt.state_dict()))
    assert [r.curvature for r in new.coverage()] == [r.curvature for r in opt.coverage()]
    for k in range(3, 6):
        quiet(train, opt, model, [points(16, k)])
        quiet(train, new, copy, [points(16, k)])
        assert torch.equal(weights(model), weights(copy))


def continued(ranks, state, model):
    def work(world):
        mine = clone(model)
        opt = natgrad.SPNGD(
            mine, lr=0.03, damping=0.03, rows_per_dim=None, refresh=natgrad.Adaptive(0.5, 24), world=world
        )
        opt.load_state_dict(state)
        for k in range(5, 9):
            backward(mine, share(Mixed.batch(24, k), world))
            opt.step()
            opt.zero_grad()
        return weights(mine), opt.intervals()

    return run_threads(ranks, work)


def test_a_whole_state_loads_on_any_number_of_ranks(double):
    def work(world):
        torch.manual_seed(0)
        model = Mixed()
        opt = natgrad.SPNGD(
            model, lr=0.03, damping=0.03, rows_per_dim=None, refresh=natgrad.Adaptive(0.5, 24), world=world
        )
        for k in range(5):
            backward(model, share(Mixed.batch(24, k), world))
            opt.step()
            opt.zero_grad()
        return model, disk(opt.gather_state_dict()), disk(opt.state_dict())

    results = run_threads(3, work)
    model, whole, part = results[0]
    for _, other, _ in results[1:]:
        for k, state in whole["state"].items():
            assert all(torch.equal(state[key], other["state"][k][key]) for key in state)
    endings = [continued(ranks, whole, model)[0] for ranks in (1, 2, 3)]
    for final, intervals in endings[1:]:
        assert_close(final, endings[0][0], **SAME)
        assert intervals == endings[0][1]
    with pytest.warns(natgrad.NatgradWarning, match="gather_state_dict"):
        continued(1, part, model)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), "another model"),
        (lambda: nn.Sequential(nn.Linear(4, 5)), "groups of"),
    ],
    ids=["shapes", "count"],
)
def test_another_models_state_changes_nothing(other, words):
    model, strange = mlp(), other()
    opt, theirs = natgrad.SPNGD(model, lr=0.1), natgrad.SPNGD(strange, lr=0.7)
    train(opt, model, [points(8, 0)])
    before = disk(opt.state_dict())
    for saved in (theirs.state_dict(), torch.optim.SGD(mlp().parameters(), 0.1).state_dict(), {"weights": 1}):
        with pytest.raises(ValueError, match=words if saved == theirs.state_dict() else "state_dict") as error:
            opt.load_state_dict(saved)
        assert "\n" not in str(error.value)
        after = opt.state_dict()
        assert after["param_groups"] == before["param_groups"]
        assert all(torch.equal(after["state"][k][key], v) for k, s in before["state"].items() for key, v in s.items())
    train(opt, model, [points(8, 1)])


def test_the_state_of_another_optimizer_kind_is_refused_or_fits():
    model, other = Net().float(), Net().float()
    kfac, spngd = natgrad.KFAC(model, lr=0.1), natgrad.SPNGD(other, lr=0.1)
    with pytest.raises(ValueError, match="lacks"):
        spngd.load_state_dict(kfac.state_dict())
