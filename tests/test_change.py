"""How much a step may change the outputs, as the next gradient shows it: against sums made by hand."""

import json
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import golden
import natgrad
from helpers import OPTIMIZERS, Mixed, backward, clone, made, mlp, points, train, weights
from natgrad.inversion import Inversion
from natgrad.optim.second_order import SAYS_NOTHING


def batches(kind, count, n=16):
    return [kind.batch(n, seed) for seed in range(count)]


def walked(model, opt, batch):
    """The displacement of one step and its gradient, by name of the parameter."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    backward(model, batch)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    opt.step()
    opt.zero_grad()
    return {n: p.detach() - before[n] for n, p in model.named_parameters()}, gradients


def dot(a, b, names):
    return sum(float((a[n] * b[n]).sum()) for n in names)


RULES = {
    "after": natgrad.Momentum(decoupled=False),
    "before": natgrad.Momentum(before=True, decoupled=False),
    "displaced": natgrad.Momentum(displaced=True, decoupled=False),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_what_was_shown_is_the_curvature_along_the_steps(rule, double):
    """s . (g' - g) from displacements and gradients; predictions from what last_step told; sums with the memory."""
    model = Mixed()
    length = natgrad.MeasuredChange(0.05, first=3.0, least=1e-3, memory=0.6)
    opt = natgrad.SPNGD(model, lr=0.3, rows_per_dim=None, refresh=2, rule=rule, length=length, weight_decay=0.01)
    loose = [c.name for c in opt.cells if c.name == "gain"]
    curved = [n for n, _ in model.named_parameters() if n not in loose]
    assert loose == ["gain"]
    shown = foreseen = shown_loose = walked_loose = 0.0
    last = None
    for k, batch in enumerate(batches(Mixed, 9)):
        opt.param_groups[0]["lr"] = lr = 0.3 / (1 + k / 4)
        step, gradient = walked(model, opt, batch)
        told = opt.last_step
        if last is not None:
            before, slope, change, reach = last
            shown = 0.6 * shown + 0.4 * (dot(before, gradient, curved) - dot(before, slope, curved))
            foreseen = 0.6 * foreseen + 0.4 * change
            shown_loose = 0.6 * shown_loose + 0.4 * (dot(before, gradient, loose) - dot(before, slope, loose))
            walked_loose = 0.6 * walked_loose + 0.4 * reach**2
        left = 0.6**k * 0.05
        ratio = max((shown + left) / (foreseen + left / 3), 1e-300)
        assert told.ratio == pytest.approx(ratio, rel=1e-7)
        assert told.bound == pytest.approx(min(length.most, max(length.least, 0.05 / ratio)), rel=1e-7)
        assert told.change <= told.bound * (1 + 1e-9)
        assert (told.factor < 1) == (told.change > told.bound * (1 - 1e-9))
        bend = max(shown_loose / walked_loose, 0.0) if walked_loose else 0.0
        assert told.loose == pytest.approx(min(1.0, (0.05 / max(lr**2 * bend, 1e-300)) ** 0.5), rel=1e-6)
        last = step, gradient, told.change, lr * told.loose
    assert any(s < 1 for s in (told.factor, told.loose))


def test_a_parameter_without_curvature_is_held_back():
    """Its step is lr times its norm until gradients show that this is too far."""
    torch.manual_seed(0)
    model = Mixed()
    model.gain.data.mul_(30)
    opt = natgrad.SPNGD(model, lr=1.0, length=natgrad.MeasuredChange(0.01))
    first, _ = walked(model, opt, Mixed.batch(32, 0))
    assert float(first["gain"].norm() / (model.gain.detach() - first["gain"]).norm()) == pytest.approx(1.0, rel=1e-5)
    factors = []
    for batch in batches(Mixed, 8, 32):
        walked(model, opt, batch)
        factors.append(opt.last_step.loose)
    assert min(factors) < 0.5


class Sometimes(nn.Module):
    """A branch that is not in every batch."""

    def __init__(self):
        super().__init__()
        self.first, self.branch, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.used = True

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.branch(hidden)) if self.used else hidden)


def test_a_layer_that_stood_still_is_not_looked_back_upon(double):
    model = Sometimes()
    opt = natgrad.SPNGD(model, lr=0.3, rows_per_dim=None, refresh=1)
    for k, used in enumerate((True, True, False, True, True)):
        model.used = used
        backward(model, points(16, k, torch.float64))
        if k == 3:
            assert opt.last_step is not None  # brings the state up to date
            assert float(opt.state[model.branch.weight]["went"].abs().sum()) == 0
            assert float(opt.state[model.head.weight]["went"].abs().sum()) > 0
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("kind", [k for k in OPTIMIZERS if k is not natgrad.NLCG], ids=lambda k: k.__name__)
def test_what_was_learned_is_part_of_the_state(kind, double):
    """A resumed run goes on to the last bit; states of versions without these numbers begin anew."""
    data = batches(Mixed, 8)
    model = Mixed()
    build = lambda m: made(kind, m, lr=0.3, rows_per_dim=None, refresh=1, length=natgrad.MeasuredChange(0.01))  # noqa: E731
    opt = build(model)
    train(opt, model, data[:4])
    other = clone(model)
    resumed = build(other)
    resumed.load_state_dict(opt.state_dict())
    assert resumed.last_step == opt.last_step
    for m, o in ((model, opt), (other, resumed)):
        train(o, m, data[4:])
    assert torch.equal(weights(model), weights(other))
    assert opt.last_step.ratio != natgrad.MeasuredChange.first
    older = opt.state_dict()
    older["param_groups"] = [
        {k: v for k, v in g.items() if k not in natgrad.MeasuredChange.numbers} for g in older["param_groups"]
    ]
    resumed.load_state_dict(older)
    train(resumed, other, data[:1])
    assert resumed.last_step.bound > 0


def test_last_step_is_none_where_nothing_is_bounded():
    model = mlp()
    opt = natgrad.SPNGD(model, lr=0.1)
    assert opt.last_step is None
    train(opt, model, [points(8, 0)])
    assert opt.last_step.bound == 0.25 / 50
    plain = natgrad.SPNGD(model, lr=0.1, length=natgrad.plain)
    train(plain, model, [points(8, 0)])
    assert plain.last_step is None
    clipped = natgrad.SPNGD(model, lr=0.1, length=natgrad.optim.kl_clip)
    train(clipped, model, [points(8, 0)])
    assert clipped.last_step[1:] == (0.01, clipped.last_step.factor, 1.0, 1.0, 0.0, 1.0)


def told_of(loss, double, **options):
    """Three steps, of which the last is told a loss: its displacement, gradient and `last_step`."""
    torch.manual_seed(0)
    model = Mixed()
    opt = natgrad.SPNGD(model, lr=0.3, rows_per_dim=None, refresh=2, weight_decay=0.0, **options)
    for batch in batches(Mixed, 2):
        walked(model, opt, batch)
    if loss is not None:
        opt.report(loss)
    return *walked(model, opt, Mixed.batch(16, 2)), opt


def test_a_step_asks_for_at_most_a_share_of_the_loss_that_was_told(double):
    """-s . g is at most share_of_loss of the loss, and the root of the predicted change at most the loss.

    A loss that is not in the way, or not above 0, changes nothing.
    """
    free, gradient, opt = told_of(None, double)
    asked = -dot(free, gradient, gradient)
    assert opt.last_step.descent == pytest.approx(asked, rel=1e-9)
    change = opt.last_step.change
    enough = 1.01 * max(2 * asked, change**0.5)
    for loss in (enough, torch.tensor(3 * enough), -1.0, 0.0, float("nan"), float("inf")):
        assert all(torch.equal(told_of(loss, double)[0][n], free[n]) for n in free)
    for length, loss, share in (
        (natgrad.MeasuredChange(share_of_loss=0.1), asked, 0.1),
        (natgrad.MeasuredChange(share_of_loss=1e9), 0.3 * change**0.5, 0.3),
    ):
        step, gradient, opt = told_of(loss, double, length=length)
        assert -dot(step, gradient, gradient) == pytest.approx(share * asked, rel=1e-9)
        assert opt.last_step.change == pytest.approx(share**2 * change, rel=1e-9)
        assert opt.last_step.held == pytest.approx(share, rel=1e-9)
        assert all(torch.allclose(step[n], share * free[n], rtol=1e-9, atol=0) for n in free)
    unbound = told_of(0.1 * asked, double, length=natgrad.MeasuredChange(share_of_loss=None))[0]
    assert all(torch.equal(unbound[n], free[n]) for n in free)


def test_losses_of_microbatches_add_up_and_zero_grad_forgets_them(double):
    free, gradient, before = told_of(None, double)
    asked = -dot(free, gradient, gradient)
    torch.manual_seed(0)
    model = Mixed()
    opt = natgrad.SPNGD(model, lr=0.3, rows_per_dim=None, refresh=2)
    for batch in batches(Mixed, 2):
        walked(model, opt, batch)
    opt.report(1e-9)
    opt.zero_grad()
    opt.report(0.03 * asked)
    opt.report(torch.tensor(0.01 * asked))
    step, _ = walked(model, opt, Mixed.batch(16, 2))
    share = min(0.02, 0.04 * asked / before.last_step.change**0.5)
    assert opt.last_step.held == pytest.approx(share, rel=1e-9)
    assert all(torch.allclose(step[n], share * free[n], rtol=1e-9, atol=0) for n in free)


def test_the_loss_of_a_closure_is_told(double):
    model = Mixed()
    twin = clone(model)
    told, closed = (natgrad.SPNGD(m, lr=0.3) for m in (model, twin))
    for _ in range(8):
        batch = Mixed.batch(16, 0)
        told.step(loss=backward(model, batch).detach())
        told.zero_grad()

        def closure(batch=batch):
            closed.zero_grad()
            return backward(twin, batch)

        assert closed.step(closure) > 0
    assert told.last_step.held < 1
    assert torch.equal(weights(model), weights(twin))


@pytest.mark.parametrize("clears", [True, False])
def test_a_closure_that_adds_to_earlier_passes_tells_no_loss(clears):
    """Trainers give the last of several passes as a closure, and its loss is not the step's."""
    model = Mixed()
    opt = natgrad.SPNGD(model, lr=0.3)

    def closure():
        if clears:
            opt.zero_grad()
        return backward(model, Mixed.batch(16, 0)) * 1e-6

    backward(model, Mixed.batch(16, 1))
    opt.step(closure)
    assert (opt.last_step.held < 1) == clears


def test_steps_that_the_loss_holds_back_for_long_are_said_once():
    model = mlp()
    opt = natgrad.SPNGD(model, lr=0.1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for k in range(210):
            backward(model, points(32, k))
            opt.step(loss=1e-6)
            opt.zero_grad()
    assert len([w for w in said if "share_of_loss=None" in str(w.message)]) == 1


def test_a_learning_rate_that_says_nothing_is_said_once():
    model, data = mlp(), [points(32, k) for k in range(110)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(natgrad.SPNGD(clone(model), lr=0.1), model, data[:20])
    bold = natgrad.SPNGD(model, lr=1e4)
    with pytest.warns(natgrad.NatgradWarning, match="lr=10000 says nothing yet: the last 100 steps"):
        train(bold, model, data)
    assert all(f < 1 for f in bold.factors)
    assert SAYS_NOTHING < 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(bold, model, data[:5])


class Tied(nn.Module):
    """A language model whose head is its embedding, with torch's own initialisation of it: standard deviation 1."""

    def __init__(self, width=32, letters=20):
        super().__init__()
        self.letters = nn.Embedding(letters, width)
        self.norm, self.grow, self.shrink = nn.LayerNorm(width), nn.Linear(width, 64), nn.Linear(64, width)
        self.last = nn.LayerNorm(width)

    def forward(self, x):
        hidden = self.letters(x)
        hidden = hidden + self.shrink(F.gelu(self.grow(self.norm(hidden))))
        return F.linear(self.last(hidden), self.letters.weight).flatten(0, 1)


def rule_of_three(n, seed):
    """Sequences in which a letter tells the next one in two cases of three."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(20, (n, 12), generator=generator)
    follows = torch.where(torch.rand(x.shape, generator=generator) < 2 / 3, (7 * x + 3) % 20, x)
    return x, follows.flatten()


@pytest.mark.parametrize("kind", [natgrad.SPNGD, natgrad.KFAC])
@pytest.mark.parametrize("lr", [0.03, 0.1, 0.3])
def test_an_unfortunate_initialisation_is_left_behind(kind, lr):
    """The loss falls from dozens of nats to the rule's own, and never rises far above what it had reached."""
    torch.manual_seed(0)
    model = Tied()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = kind(model, lr=lr)
        losses = train(opt, model, [rule_of_three(64, k) for k in range(150)])
    assert losses[0] > 15
    lowest = [min(losses[: k + 1]) for k in range(len(losses))]
    assert max(now - low for now, low in zip(losses, lowest)) < 3
    assert losses[-1] < 3.2  # an even guess has 3.0, the rule 0.7


@pytest.mark.parametrize("case", ["spngd, measured change", "spngd, predicted change"])
def test_products_in_pieces_add_up(monkeypatch, case):
    """Layers are cut where they are larger than a piece; some pieces hold several layers."""
    monkeypatch.setattr("natgrad.optim.segments.TOGETHER", 20)
    kept = json.loads(golden.FILE.read_text())[f"{case}, 1"]
    assert golden.difference(golden.made(case, 1), kept) < 1e-9


def test_sums_of_pieces_are_those_of_layers(monkeypatch):
    monkeypatch.setattr("natgrad.optim.segments.TOGETHER", 9)
    model = mlp().double()
    opt, seen = natgrad.SPNGD(model, 0.1), []

    class Looking(natgrad.MeasuredChange):
        def lengths(self, segments, world, numbers):
            for segment in segments:
                a, b = segment.gradient, segment.direction
                told = segment.sums((a,), (a, b))
                seen.append(len(segment.outline.chunks))
                for k, (own, other) in enumerate(zip(segment.pieces(a), segment.pieces(b))):
                    torch.testing.assert_close(told[:, k], torch.stack([own.sum(), (own * other).sum()]))
            return super().lengths(segments, world, numbers)

    opt.method.length = Looking()
    train(opt, model, [points(8, k, torch.float64) for k in range(2)])
    assert seen == [5, 5]  # of 25 and 18 numbers


def test_a_step_that_was_refused_loses_nothing_of_the_one_before():
    """What a step has found out reaches the host with the next one, also where an error came in between."""
    data = [points(16, k) for k in range(6)]
    (plain, model) = (mlp(), mlp())
    model.load_state_dict(plain.state_dict())
    one, other = (natgrad.SPNGD(m, lr=0.3, refresh=2) for m in (plain, model))
    train(one, plain, data)
    train(other, model, data[:3])
    backward(model, data[3])
    other.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr=-1"):
        other.step()
    other.param_groups[0]["lr"] = 0.3
    other.step()
    other.zero_grad()
    train(other, model, data[4:])
    assert torch.equal(weights(model), weights(plain))
    assert other.last_step == one.last_step


def test_a_step_that_fails_while_it_measures_leaves_a_usable_optimizer(monkeypatch):
    """As an allocation that fails does."""
    model = mlp()
    opt = natgrad.SPNGD(model, lr=0.1, refresh=1)
    train(opt, model, [points(16, 0)])

    def full(*_):
        raise torch.OutOfMemoryError("no memory is left")

    backward(model, points(16, 1))
    with monkeypatch.context() as patch:
        patch.setattr(Inversion, "invert", full)
        with pytest.raises(torch.OutOfMemoryError):
            opt.step()
    opt.zero_grad()
    before = weights(model)
    train(opt, model, [points(16, k) for k in range(2, 6)])
    assert torch.isfinite(weights(model)).all()
    assert not torch.equal(weights(model), before)
    assert opt.refreshed > 0
