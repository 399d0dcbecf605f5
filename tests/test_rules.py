"""Where a step goes and how long it is: momentum, weight decay, trust, predicted change, rescaling."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import natgrad
from helpers import Net, backward, clone, mlp, points, train, weights
from natgrad.optim.rescale import he_norm


def polynomial(progress, begin, end, power):
    return (1 - max(progress - begin, 0) / (end - begin)) ** power


@pytest.mark.parametrize(
    ("epochs", "begin", "end", "power", "m0", "steps", "paper", "release"),
    [
        (35, 1, 53, 11.0, 0.997, 10_948, 0.015, 0.996),
        (35, 1, 53.5, 8.0, 0.985, 2_737, 0.048, 0.982),
        (45, 1.5, 49.5, 3.5, 0.97, 1_760, 0.130, 0.967),
        (90, 3, 100, 2.9, 0.93, 873, 0.18, 0.925),
    ],
    ids=["4K", "16K", "32K", "131K"],
)
def test_momentum_half_way_through_the_papers_runs(epochs, begin, end, power, m0, steps, paper, release):
    """Spec section 9. On displacements (buffer times lr) the coefficient is keep * lr / last."""
    half = epochs / 2
    first, lr = 1.0, polynomial(half, begin, end, power)
    last = polynomial(half - epochs / steps, begin, end, power)
    assert natgrad.optim.tied(m0, lr, last, first) * lr / last == pytest.approx(paper, rel=0.05)
    assert natgrad.optim.corrected(m0, lr, last, first) * lr / last == pytest.approx(release, abs=1.1e-3)
    assert natgrad.optim.heavy_ball(m0, lr, last, first) * lr / last == pytest.approx(m0)


def steps_of(options, lrs, count=3):
    """Weights of an mlp after each step, the gradients, and the inverse of the engine as a function."""
    torch.manual_seed(0)
    model = mlp(bias=False).double()
    opt = natgrad.SPNGD(
        model, lr=lrs[0], **{"rows_per_dim": None, "refresh": 100, "damping": 0.1, "length": natgrad.plain, **options}
    )
    path, gradients = [[p.detach().clone() for p in model.parameters()]], []
    for k in range(count):
        opt.param_groups[0]["lr"] = lrs[k]
        backward(model, points(12, k, torch.float64))
        gradients.append([p.grad.clone() for p in model.parameters()])
        opt.step()
        opt.zero_grad()
        path.append([p.detach().clone() for p in model.parameters()])
    natural = [[c.precondition(g.unsqueeze(0), 0.1)[0] for c, g in zip(opt.cells, gs)] for gs in gradients]
    return path, natural


LRS = (0.1, 0.05, 0.02)
KEEPS = {
    # on displacements: v(t) = m(t) v(t-1) - lr(t) U(t)
    natgrad.optim.tied: [0.0, 0.9 * 0.05 / 0.1, 0.9 * 0.02 / 0.1],  # m0 / eta0 * eta(t), SP-NGD eq. 22
    natgrad.optim.corrected: [0.0, 0.9 * 0.05 / 0.1, 0.9 * 0.02 / 0.05],  # m0 * eta(t) / eta(t-1), its release
    natgrad.optim.heavy_ball: [0.0, 0.9, 0.9],
}


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("rule", KEEPS, ids=lambda r: r.__name__)
def test_three_steps_of_momentum_are_the_papers_displacements(rule, before):
    """Before or after preconditioning is the same while the inverse stands still."""
    path, natural = steps_of({"momentum": 0.9, "rule": natgrad.Momentum(before, rule)}, LRS)
    for k in range(2):
        move = torch.zeros_like(path[0][k])
        for t, (lr, keep) in enumerate(zip(LRS, KEEPS[rule])):
            move = keep * move - lr * natural[t][k]
            assert_close(path[t + 1][k] - path[t][k], move, rtol=1e-9, atol=1e-12)


def test_the_first_lr_of_tied_momentum_is_a_schedulers():
    model = mlp()
    opt = natgrad.SPNGD(model, lr=0.2, rule=natgrad.Momentum(coefficient=natgrad.optim.tied))
    torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 0.5)
    train(opt, model, [points(8, 0)])
    assert opt.param_groups[0]["initial_lr"] == 0.2


def one_step(options):
    """First and second gradients differ, the second inverse differs: order matters."""
    torch.manual_seed(0)
    model = mlp(bias=False).double()
    opt = natgrad.SPNGD(
        model, lr=0.1, rows_per_dim=None, refresh=1, damping=0.1, momentum=0.9, length=natgrad.plain, **options
    )
    gradients, naturals = [], []
    for k in range(3):
        backward(model, points(12, k, torch.float64))
        gradients.append(model[0].weight.grad.clone())
        start = model[0].weight.detach().clone()
        opt.step()
        opt.zero_grad()
        naturals.append(opt.cells[0].precondition(gradients[-1].unsqueeze(0), 0.1)[0])
        move = (model[0].weight.detach() - start) / -0.1
    return opt, gradients, naturals, move


def test_momentum_before_preconditioning_sees_todays_curvature_in_its_past():
    opt, g, _, move = one_step({"rule": natgrad.Momentum(before=True)})
    buffer = 0.81 * g[0] + 0.9 * g[1] + g[2]
    assert_close(move, opt.cells[0].precondition(buffer.unsqueeze(0), 0.1)[0], rtol=1e-9, atol=1e-12)


def test_momentum_after_preconditioning_keeps_old_natural_gradients():
    _, _, n, move = one_step({"rule": natgrad.Momentum(before=False)})
    assert_close(move, 0.81 * n[0] + 0.9 * n[1] + n[2], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("before", [False, True])
def test_weight_decay_is_not_curved(before):
    moves = []
    for decay in (0.0, 0.3):
        options = {"momentum": 0.0, "rule": natgrad.Momentum(before), "weight_decay": decay}
        path, _ = steps_of(options, (0.1,), 1)
        moves.append(path[1][0] - path[0][0])
    assert_close(moves[1] - moves[0], -0.1 * 0.3 * path[0][0], rtol=1e-9, atol=1e-12)


class Scaled(nn.Module):
    """A parameter without curvature."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 4))

    def forward(self, x):
        return x * self.gain


LENGTHS = {
    "plain": natgrad.plain,
    "trust": natgrad.trust,
    "kl": natgrad.KLClip(1e-6),
    "measured": natgrad.optim.measured_change,
}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("way", ["simple", "directions", "half"])
def test_decay_takes_the_same_share_of_every_weight(length, way):
    """As AdamW: w <- (1 - lr c) w - lr d. No momentum repeats it, no length shortens it, no fallback stretches it."""
    start = nn.Sequential(Scaled(), nn.Linear(4, 3)).double()
    if way == "half":
        start = start.bfloat16()
    dtype = start[1].weight.dtype
    kind = natgrad.KFAC if way == "directions" else natgrad.SPNGD
    options = {"gather": "directions"} if way == "directions" else {}
    model = clone(start)
    opt = kind(model, lr=0.1, momentum=0.9, rows_per_dim=None, weight_decay=0.3, length=LENGTHS[length], **options)
    for k in range(3):  # directions come to nothing, so that what moves is decay
        before = clone(model)
        backward(model, points(8, k, dtype))
        for p in model.parameters():
            p.grad.zero_()
        opt.step()
        opt.zero_grad()
        tolerance = {"rtol": 1e-2, "atol": 1e-3} if way == "half" else {"rtol": 1e-12, "atol": 0}
        for p, q in zip(model.parameters(), before.parameters()):
            assert_close(p, 0.97 * q, **tolerance)


@pytest.mark.parametrize("decoupled", [True, False])
def test_decay_beside_the_direction_leaves_the_direction_alone(decoupled):
    """The same gradients, with decay and without, differ by the decay of each step alone."""
    start = nn.Sequential(Scaled(), nn.Linear(4, 3)).double()
    found = []
    for decay in (0.0, 0.3):
        model = clone(start)
        rule = natgrad.Momentum(decoupled=decoupled)
        opt = natgrad.KFAC(
            model, lr=0.1, rows_per_dim=None, refresh=100, weight_decay=decay, rule=rule, length=natgrad.plain
        )
        with torch.no_grad():  # the same weights before every step
            for k in range(3):
                before = [p.clone() for p in start.parameters()]
                for p, q in zip(model.parameters(), before):
                    p.copy_(q)
                with torch.enable_grad():
                    backward(model, points(8, k, torch.float64))
                opt.step()
                opt.zero_grad()
        found.append([p - q for p, q in zip(model.parameters(), start.parameters())])
    for with_decay, without, weight in zip(found[1], found[0], start.parameters()):
        same = torch.allclose(with_decay - without, -0.03 * weight, rtol=1e-9, atol=1e-12)
        assert same == decoupled


@pytest.mark.parametrize("before", [False, True])
def test_each_parameter_has_its_own_groups_weight_decay(before):
    """The weight and the bias of one layer in two groups."""
    start, moves = nn.Linear(4, 3).double(), []
    for decay in (0.0, 0.3):
        model = clone(start)
        groups = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": decay}]
        options = {"rows_per_dim": None, "momentum": 0.0, "rule": natgrad.Momentum(before)}
        train(
            natgrad.SPNGD(model, lr=0.1, params=groups, length=natgrad.plain, **options),
            model,
            [points(8, 0, torch.float64)],
        )
        moves.append((model.weight.detach().clone(), model.bias.detach().clone()))
    assert torch.equal(moves[0][0], moves[1][0])
    assert_close(moves[1][1] - moves[0][1], -0.1 * 0.3 * start.bias.detach())


@pytest.mark.parametrize("options", [{}, {"rule": natgrad.Momentum(before=True)}])
def test_a_trusted_step_is_lr_times_the_weight(options):
    model = Net().double()
    opt = natgrad.SPNGD(model, lr=0.07, rows_per_dim=None, length=natgrad.trust, **options)
    for k in range(3):
        before = [[p.detach().clone() for p in c.layer.parameters] for c in opt.cells]
        train(opt, model, [Net.batch(8, k)])
        for cell, start in zip(opt.cells, before):
            weight = math.sqrt(sum(float(s.square().sum()) for s in start))
            step = math.sqrt(sum(float((p.detach() - s).square().sum()) for p, s in zip(cell.layer.parameters, start)))
            assert step == pytest.approx(0.07 * weight, rel=1e-6)


def test_trust_moves_a_layer_that_starts_at_zero():
    model = mlp()
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    train(natgrad.SPNGD(model, lr=0.1, length=natgrad.trust), model, [points(8, 0)])
    assert 0 < float(model[2].weight.detach().norm()) < 1


@pytest.mark.parametrize("limit", [1e-4, 1e-2, 1e3])
def test_the_predicted_change_stays_below_its_limit(limit):
    """lr^2 d . g over all layers, for a step without momentum; short steps are left alone."""
    model, plain = Net().double(), Net().double()
    plain.load_state_dict(model.state_dict())
    start = weights(model)
    options = {"lr": 0.5, "momentum": 0.0, "rows_per_dim": None}
    free, opt = (
        natgrad.SPNGD(plain, **options, length=natgrad.plain),
        natgrad.SPNGD(model, **options, length=natgrad.KLClip(limit)),
    )
    for m, o in ((plain, free), (model, opt)):
        backward(m, Net.batch(8, 0))
        gradient = torch.cat([p.grad.flatten() for p in m.parameters()])
        o.step()
    full, step = start - weights(plain), start - weights(model)
    change = 0.5 * float(full @ gradient)
    factor = min(1.0, math.sqrt(limit / change))
    assert_close(step, full * factor, rtol=1e-7, atol=1e-12)
    assert 0.5 * float(step @ gradient) * factor <= limit * (1 + 1e-6)
    assert (factor == 1.0) == (limit == 1e3)


def test_he_norm_is_that_of_hes_initialisation():
    for module in (nn.Linear(400, 300), nn.Conv2d(64, 128, 3), nn.Conv2d(64, 128, 3, groups=8)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        assert float(module.weight.detach().norm()) == pytest.approx(he_norm(module.weight.shape[0]), rel=0.02)


@pytest.mark.parametrize("how", ["always", "shrink"])
def test_rescaling_holds_weights_and_nothing_else(how):
    model, plain = Net().double(), Net().double()
    for m in (model, plain):
        m.conv.weight.data.mul_(10)
    plain.load_state_dict(model.state_dict())
    for m, rescale in ((model, how), (plain, None)):
        train(natgrad.SPNGD(m, lr=0.01, rows_per_dim=None, rescale=rescale), m, [Net.batch(8, 0)])
    norms = {"conv": model.conv.weight.norm().item(), "head": model.head.weight.norm().item()}
    assert norms["conv"] == pytest.approx(math.sqrt(8))
    unscaled = plain.head.weight.norm().item()
    assert unscaled < math.sqrt(6)
    assert norms["head"] == pytest.approx(math.sqrt(6) if how == "always" else unscaled)
    assert_close(model.norm.weight, plain.norm.weight, rtol=1e-14, atol=1e-16)
    assert_close(model.conv.bias, plain.conv.bias, rtol=1e-14, atol=1e-16)
    assert_close(model.conv.weight / model.conv.weight.norm(), plain.conv.weight / plain.conv.weight.norm())


def test_a_rule_and_a_length_of_your_own():
    class Sign:
        def allocate(self, layer, state):
            state["mine"] = torch.zeros(1)

        def __call__(self, steps, natural, world):
            for step, curved in zip(steps, natural(steps, [s.gradient for s in steps])):
                step.state["mine"] += 1
                step.direction = curved.sign()

    model = mlp()
    start = weights(model)
    opt = natgrad.SPNGD(model, lr=0.1, rule=Sign(), length=lambda steps, world: [0.5] * len(steps))
    train(opt, model, [points(8, 0)])
    assert_close((weights(model) - start).abs(), torch.full_like(start, 0.05))
    assert float(opt.state_dict()["state"][0]["mine"]) == 1
    train(opt, model, [points(8, 1)])
    assert float(opt.state_dict()["state"][0]["mine"]) == 2
