"""The model of today: what was frozen, unfrozen, added, replaced or moved since the optimizer was built."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.testing import assert_close

import natgrad
from helpers import OPTIMIZERS, backward, clone, made, mlp, points, quiet, row, train, unwarned, weights

every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)


# --- frozen and unfrozen ---


@pytest.mark.parametrize("decay", [0.0, 0.1])
@every_optimizer
def test_a_layer_that_is_frozen_keeps_still(kind, decay):
    """Whatever momentum, decay and stale gradients would do."""
    model = mlp()
    opt = made(kind, model, lr=0.1, weight_decay=decay)
    train(opt, model, [points(12, k) for k in range(2)])
    backward(model, points(12, 2))
    model[0].requires_grad_(False)  # with its gradient left
    kept = [p.detach().clone() for p in model[0].parameters()]
    opt.step()
    opt.zero_grad()
    train(opt, model, [points(12, k) for k in range(3)])
    assert all(torch.equal(p, k) for p, k in zip(model[0].parameters(), kept))
    model[0].requires_grad_(True)
    train(opt, model, [points(12, k) for k in range(3)])
    assert not torch.equal(model[0].weight, kept[0])
    assert all(r.covered for r in opt.coverage())


@pytest.mark.parametrize("decay", [0.0, 0.1])
@every_optimizer
def test_a_weight_that_is_frozen_keeps_still_while_its_bias_trains(kind, decay):
    model = mlp()
    opt = made(kind, model, lr=0.1, weight_decay=decay)
    train(opt, model, [points(12, k) for k in range(2)])
    model[0].weight.requires_grad_(False)
    kept, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    with pytest.warns(natgrad.NatgradWarning, match="0: some of its parameters were frozen"):
        train(opt, model, [points(12, k) for k in range(3)])
    assert torch.equal(model[0].weight, kept)
    assert not torch.equal(model[0].bias, bias)
    assert "frozen" in row(opt, "0.weight").why
    model[0].weight.requires_grad_(True)
    opt.rebuild()
    train(opt, model, [points(12, k) for k in range(2)])
    assert not torch.equal(model[0].weight, kept)
    assert row(opt, "0").covered


@every_optimizer
def test_a_layer_that_is_unfrozen_trains_from_that_step_on(kind):
    model = mlp()
    model[0].requires_grad_(False)
    opt = made(kind, model, lr=0.1, refresh=1)
    train(opt, model, [points(12, k) for k in range(2)])
    momenta = {p: dict(opt.state[p]) for p in model[2].parameters()}
    model[0].requires_grad_(True)
    start = model[0].weight.detach().clone()
    train(opt, model, [points(12, 3)])
    assert not torch.equal(model[0].weight, start)
    assert [r.layer for r in opt.coverage()] == ["0", "2"]
    assert all(int(s["step"]) == 3 for s in opt.state.values())
    assert all(opt.state[p].keys() == m.keys() for p, m in momenta.items())
    losses = train(opt, model, [points(12, 3)] * 6)
    assert losses[-1] < losses[0]
    assert all(c.ready for c in opt.cells)


@every_optimizer
def test_unfreezing_leaves_the_other_layers_steps_alone(kind):
    """In the step in which another layer is unfrozen, and after it, what does not see it goes on as before."""
    torch.manual_seed(0)
    alone, model = mlp(), nn.ModuleDict({"a": mlp(), "b": nn.Linear(4, 3)})
    model["a"].load_state_dict(alone.state_dict())
    model["b"].requires_grad_(False)
    options = {"lr": 0.05, "refresh": 1, "rows_per_dim": None}
    if kind is natgrad.NLCG:
        pytest.skip("its inner products are over all parameters")
    opts = made(kind, alone, length=natgrad.plain, **options), made(kind, model, length=natgrad.plain, **options)
    for k in range(5):
        if k == 2:
            model["b"].requires_grad_(True)
        x, y = points(12, k)
        F.cross_entropy(alone(x), y).backward()
        (F.cross_entropy(model["a"](x), y) + F.cross_entropy(model["b"](x), y)).backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
    assert_close(weights(model["a"]), weights(alone), rtol=1e-4, atol=1e-6)


@every_optimizer
def test_a_group_is_added_for_what_was_unfrozen(kind):
    """Gradual unfreezing as trainers do it: a group with a learning rate of its own."""
    model = mlp()
    model[0].requires_grad_(False)
    opt = made(kind, model, lr=0.1)
    train(opt, model, [points(12, 0)])
    model[0].requires_grad_(True)
    opt.add_param_group({"params": list(model[0].parameters()), "lr": 0.05})
    assert [g["lr"] for g in opt.param_groups] == [0.1, 0.05]
    assert opt.group_of(model[0].weight)["lr"] == 0.05
    start = model[0].weight.detach().clone()
    train(opt, model, [points(12, k) for k in range(3)])
    assert not torch.equal(model[0].weight, start)
    assert all(r.covered for r in opt.coverage())
    with pytest.raises(ValueError, match="is not the model's"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    model[2].requires_grad_(False)
    with pytest.raises(ValueError, match="none of its parameters requires a gradient"):
        opt.add_param_group({"params": list(model[2].parameters())})


def test_parameters_that_were_left_out_stay_out():
    """With params=, what it does not name belongs to somebody else, frozen or not."""
    model = mlp()
    opt = natgrad.SPNGD(model, lr=0.1, params=list(model[2].parameters()))
    start = model[0].weight.detach().clone()
    with unwarned():
        train(opt, model, [points(12, k) for k in range(2)])
    assert torch.equal(model[0].weight, start)


# --- added, replaced, moved ---


def test_what_was_added_is_named_and_taken_in_by_rebuild():
    model = mlp()
    opt = natgrad.SPNGD(model, lr=0.1)
    train(opt, model, [points(12, 0)])
    model.add_module("new", nn.Linear(3, 3))
    with pytest.warns(natgrad.NatgradWarning, match=r"new.weight was added.*rebuild"):
        train(opt, model, [points(12, 1)])
    with unwarned():
        train(opt, model, [points(12, 2)])  # said once
    start = model.new.weight.detach().clone()
    opt.rebuild()
    train(opt, model, [points(12, k) for k in range(2)])
    assert not torch.equal(model.new.weight, start)


@every_optimizer
def test_what_was_replaced_is_refused_until_rebuild(kind):
    """Else the optimizer would train what the model no longer has. The rest keeps its state."""
    torch.manual_seed(0)
    model = mlp()
    opt = made(kind, model, lr=0.1)
    train(opt, model, [points(12, k) for k in range(3)])
    model[2] = nn.Linear(5, 3)
    backward(model, points(12, 3))
    opt.settle()  # the last step is told before a copy is made
    kept = {k: v.clone() for k, v in opt.state[model[0].weight].items() if isinstance(v, torch.Tensor)}
    with pytest.raises(ValueError, match=r"2.weight is no longer the parameter.*rebuild"):
        opt.step()
    opt.rebuild()
    now = opt.state[model[0].weight]
    assert now.keys() == opt.state[model[0].weight].keys() >= kept.keys()
    for key in kept.keys() & now.keys():
        assert_close(now[key], kept[key])
    opt.zero_grad()
    losses = train(opt, model, [points(12, 3)] * 8)
    assert losses[-1] < losses[0]


def test_what_was_parametrised_is_refused_until_rebuild():
    model = mlp()
    opt = natgrad.SPNGD(model, lr=0.1)
    nn.utils.parametrizations.weight_norm(model[0])
    backward(model, points(12, 0))
    with pytest.raises(ValueError, match=r"0.weight is no longer the parameter"):
        opt.step()
    quiet(opt.rebuild)
    train(opt, model, [points(12, 0)])


@every_optimizer
def test_rebuild_without_a_change_changes_nothing(kind):
    """Momentum, statistics, rows and clocks are carried over."""
    ends = []
    for rebuilt in (False, True):
        torch.manual_seed(0)
        model = mlp()
        opt = made(kind, model, lr=0.05, refresh=2)
        for k in range(6):
            if rebuilt and k == 3:
                opt.rebuild()
            train(opt, model, [points(24, k)])
        ends.append(weights(model))
    assert torch.equal(*ends)


# --- gradients of other kinds ---


class Lookup(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table, self.head = table, nn.Linear(4, 3)

    def forward(self, i):
        return self.head(self.table(i))


@every_optimizer
def test_sparse_gradients_train_as_dense_ones(kind):
    ends = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = Lookup(nn.EmbeddingBag(20, 4, mode="sum", sparse=sparse))
        opt = quiet(made, kind, model, lr=0.1)
        for k in range(3):
            torch.manual_seed(k)
            backward(model, (torch.randint(20, (16, 3)), torch.randint(3, (16,))))
            quiet(opt.step)
            opt.zero_grad()
        assert not row(opt, "table.weight").covered
        ends.append(weights(model))
    assert_close(*ends)


class Waves(nn.Module):
    """A complex weight, as itself or as pairs of real numbers."""

    def __init__(self, pairs):
        super().__init__()
        torch.manual_seed(0)
        wave = torch.randn(4, 3, dtype=torch.complex128)
        self.pairs = pairs
        self.wave = nn.Parameter(torch.view_as_real(wave).clone() if pairs else wave)
        self.head = nn.Linear(3, 3).double()

    def forward(self, x):
        wave = torch.view_as_complex(self.wave) if self.pairs else self.wave
        return self.head((x.to(torch.complex128) @ wave).abs())


@pytest.mark.parametrize("decay", [0.0, 0.1])
@every_optimizer
def test_complex_parameters_train_as_pairs_of_real_ones(kind, decay):
    ends = []
    for pairs in (False, True):
        model = Waves(pairs)
        opt = quiet(made, kind, model, lr=0.1, weight_decay=decay)
        train(opt, model, [points(16, k, torch.float64) for k in range(4)])
        ends.append((model.wave.detach() if pairs else torch.view_as_real(model.wave.detach())).clone())
    assert_close(*ends, rtol=1e-10, atol=1e-12)


# --- states and schedules ---


@pytest.mark.parametrize("block", ["layer", "network"])
@every_optimizer
def test_nothing_that_was_made_of_an_earlier_state_survives_loading(kind, block):
    """An optimizer with a history of its own that loads a state goes on like one that has none."""
    if block == "network" and kind is not natgrad.SENG:
        pytest.skip("for SENG")
    options = {"lr": 0.05, "refresh": 4} | ({"block": block} if kind is natgrad.SENG else {})
    torch.manual_seed(0)
    source = mlp()
    opt = made(kind, source, **options)
    train(opt, source, [points(24, k) for k in range(2)])
    saved, start = opt.state_dict(), clone(source)
    ends = []
    for used in (False, True):
        model = mlp()
        other = made(kind, model, **options)
        if used:
            train(other, model, [points(24, k) for k in range(7, 9)])
        model.load_state_dict(start.state_dict())
        other.load_state_dict(saved)
        train(other, model, [points(24, k) for k in range(2, 5)])
        ends.append(weights(model))
    assert torch.equal(*ends)


SCHEDULES = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.2, step_size_up=3),
    "warm-up": lambda o: lr_scheduler.LinearLR(o, 0.01, total_iters=5),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tied_momentum_never_exceeds_what_was_asked_for(schedule):
    model, seen = mlp(), []

    def watched(momentum, lr, last, first):
        seen.append((natgrad.optim.tied(momentum, lr, last, first), momentum))
        return seen[-1][0]

    opt = natgrad.SPNGD(model, lr=0.1, rule=natgrad.Momentum(coefficient=watched))
    plan = SCHEDULES[schedule](opt)
    for k in range(18):
        train(opt, model, [points(12, k)])
        plan.step()
    assert all(used <= asked for used, asked in seen)


def test_schedules_that_move_momentum_are_mentioned_where_it_cannot_move():
    model = mlp()
    opt = natgrad.NLCG(model, lr=0.1, step=natgrad.Scheduled(feedback=None))
    lr_scheduler.OneCycleLR(opt, max_lr=0.2, total_steps=20)
    backward(model, points(12, 0))
    with pytest.raises(ValueError, match="cycle_momentum=False"):
        opt.step()
