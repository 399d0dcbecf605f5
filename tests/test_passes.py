"""Which passes count for a step, what a sample is, and what a loss is a mean of: against computations by autograd."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import natgrad
from helpers import (
    OPTIMIZERS,
    Opaque,
    backward,
    clone,
    heard,
    made,
    mlp,
    points,
    quiet,
    said_by,
    statistic,
    unwarned,
    weights,
)

every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
EXACT = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _in_double_precision(double):
    """Everything here is compared to rounding in float64."""


def build(kind, model, **options):
    return made(kind, model, **{"lr": 0.1, "rows_per_dim": None, "refresh": 1, **options})


def after(kind, model, passes, steps=2, **options):
    """Weights after steps of `passes(model, optimizer, step)`, and the samples that were counted."""
    own = clone(model)
    opt = build(kind, own, **options)
    for step in range(steps):
        opt.zero_grad()
        passes(own, opt, step)
        opt.step()
    return weights(own), opt.engine.samples


def batch_of(step, n=16):
    return points(n, step, torch.float64)


# --- passes that do not add to the gradients ---


def attacked(model, x, y):
    """Inputs moved against the loss, as adversarial training does."""
    x = x.clone()
    for _ in range(3):
        x.requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
        x = (x + 0.05 * g.sign()).detach()
    return x


@every_optimizer
def test_gradients_of_inputs_leave_nothing_behind(kind):
    model = mlp()
    moved = [attacked(clone(model), *batch_of(0))]

    def outside(own, opt, step):
        backward(own, (moved[0], batch_of(0)[1]))

    def inside(own, opt, step):
        x, y = batch_of(0)
        torch.autograd.grad(own(x).sum(), list(own.parameters()))  # captured for the caller
        x = attacked(own, x, y)
        assert torch.equal(x, moved[0])
        backward(own, (x, y))

    expected, found = (after(kind, model, passes, steps=1) for passes in (outside, inside))
    assert found[1] == expected[1] == 16
    assert torch.equal(found[0], expected[0])


@every_optimizer
def test_a_pass_towards_some_parameters_counts_for_their_layers_alone(kind):
    """backward(inputs=...) adds to the head's gradients; the body waits as if it had not been called."""
    model = mlp()
    start = model[0].weight.detach().clone()
    opt = build(kind, model)
    x, y = batch_of(0)
    F.cross_entropy(model(x), y).backward(inputs=list(model[2].parameters()))
    opt.step()
    assert opt.engine.samples == 16
    assert torch.equal(model[0].weight, start)
    assert all(row.covered for row in opt.coverage())


@every_optimizer
def test_a_loss_of_derivatives_of_the_network_is_refused(kind):
    """Hooks see the first pass alone. Here no layer would keep its curvature."""
    model = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1))
    opt = build(kind, model)
    x = torch.linspace(0, 1, 9)[:, None].requires_grad_()
    (du,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (du - x.cos()).square().mean().backward()
    start = weights(model)
    with pytest.raises(ValueError, match=r"derivatives of the network.*double backward"):
        opt.step()
    assert torch.equal(weights(model), start)


def test_layers_beside_a_gradient_penalty_keep_their_curvature():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.critic, self.other = mlp(), nn.Linear(4, 3)

        def forward(self, x):
            return self.critic(x), self.other(x)

    model = Net()
    opt = build(natgrad.SPNGD, model)
    x, y = batch_of(0)
    x = x.clone().requires_grad_()
    out, side = model(x)
    (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    (F.cross_entropy(side, y) + (g.norm(dim=1) - 1).square().mean()).backward()
    with pytest.warns(natgrad.NatgradWarning, match="critic.0, critic.2: the loss holds derivatives of the network"):
        opt.step()
    assert {row.layer: row.covered for row in opt.coverage()}["other"]


def test_the_curvature_step_looks_along_outputs_that_are_derivatives():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1))
    opt = natgrad.NLCG(model, preconditioner=None, step=natgrad.CurvatureStep(output="squared"))
    x0 = torch.linspace(0, 1, 9)[:, None]

    def residual():
        x = x0.clone().requires_grad_()
        (du,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return du - x.cos()

    losses = []
    for _ in range(5):
        loss = 0.5 * residual().square().mean()
        losses.append(float(loss.detach()))
        opt.zero_grad()
        loss.backward()
        opt.step(forward=residual)
    assert losses[-1] < losses[0]


# --- several passes through one forward pass, several forward passes before one backward pass ---


class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.policy, self.value = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 1)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.policy(h), self.value(h)[:, 0]


def actor_and_critic(model, x, y):
    logits, value = model(x)
    return F.cross_entropy(logits, y), 0.5 * (value - x.sum(1)).square().mean()


@every_optimizer
def test_two_backward_passes_through_one_forward_pass_are_that_of_the_sum(kind):
    def one(own, opt, step):
        sum(actor_and_critic(own, *batch_of(step))).backward()

    def two(own, opt, step):
        actor, critic = actor_and_critic(own, *batch_of(step))
        actor.backward(retain_graph=True)
        critic.backward()

    def two_kept(own, opt, step):
        actor, critic = actor_and_critic(own, *batch_of(step))
        actor.backward(retain_graph=True)
        critic.backward(retain_graph=True)  # so that nothing says it was the last one

    model = ActorCritic()
    expected, n = after(kind, model, one)
    for passes in (two, two_kept):
        found, counted = after(kind, model, passes)
        assert counted == n == 16
        assert_close(found, expected, **EXACT)


@every_optimizer
def test_forward_passes_before_one_backward_pass_are_a_larger_batch(kind):
    """A rollout of three steps of 8 samples is a batch of 24."""

    def whole(own, opt, step):
        backward(own, batch_of(step, 24))

    def rollout(own, opt, step):
        x, y = batch_of(step, 24)
        outs = [own(part) for part in x.chunk(3)]
        F.cross_entropy(torch.cat(outs), y).backward()

    model = mlp()
    expected, found = after(kind, model, whole), after(kind, model, rollout)
    assert found[1] == expected[1] == 24
    assert_close(found[0], expected[0], **EXACT)


@pytest.mark.parametrize("clear", ["optimizer", "none", "zero"])
@every_optimizer
def test_what_was_measured_of_cleared_gradients_goes_with_them(kind, clear):
    """A GAN's generator leaves gradients in the discriminator, which anybody may clear."""

    def plain(own, opt, step):
        backward(own, batch_of(step))

    def leaky(own, opt, step):
        backward(own, batch_of(step + 7, 5))
        if clear == "optimizer":
            opt.zero_grad()
        else:
            own.zero_grad(set_to_none=clear == "none")
        backward(own, batch_of(step))

    model = mlp()
    expected, found = after(kind, model, plain, steps=3), after(kind, model, leaky, steps=3)
    assert found[1] == expected[1] == 16
    assert_close(found[0], expected[0], **EXACT)


def test_layers_called_outside_of_the_model_are_one_pass():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.body(x)))

    def by_parts(own, opt, step):
        x, y = batch_of(step)
        F.cross_entropy(own.head(torch.tanh(own.body(x))), y).backward()

    model = Parts()
    expected, n = after(natgrad.SPNGD, model, lambda own, opt, step: backward(own, batch_of(step)))
    found, counted = after(natgrad.SPNGD, model, by_parts)
    assert counted == n == 16
    assert_close(found, expected, **EXACT)


def test_a_forward_pass_that_fails_leaves_the_next_one_right():
    class Fragile(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.fails = mlp(), False

        def forward(self, x):
            out = self.inner(x)
            if self.fails:
                raise RuntimeError("out of memory")
            return out

    def fragile(own, opt, step):
        own.fails = True
        with pytest.raises(RuntimeError, match="out of memory"):
            own(batch_of(step)[0])
        own.fails = False
        backward(own, batch_of(step))

    model = Fragile()
    expected, found = after(natgrad.SPNGD, model, lambda o, opt, k: backward(o, batch_of(k))), None
    found = after(natgrad.SPNGD, model, fragile)
    assert found[1] == expected[1]
    assert torch.equal(found[0], expected[0])


# --- samples: some layers see a part of them ---


class Recurrent(nn.Module):
    """A recurrent network of linear layers; with `packed`, only sequences that go on are computed."""

    def __init__(self, packed):
        super().__init__()
        self.packed = packed
        self.inp, self.rec, self.out = nn.Linear(3, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 3)

    def forward(self, x, lengths):
        h = x.new_zeros(len(x), 5)
        for t in range(x.shape[1]):
            n = int((lengths > t).sum()) if self.packed else len(x)
            h = torch.cat([torch.tanh(self.inp(x[:n, t].clone()) + self.rec(h[:n])), h[n:]])
        return self.out(h)


def sequences(n=10, steps=5):
    x, y = torch.randn(n, steps, 3), torch.randint(3, (n,))
    return x, y, torch.arange(n).flip(0) % steps + 1


def rows_by_autograd(model, losses):
    """Gradients of single samples, by layer [n, weights]."""
    layers = {}
    for name, p in model.named_parameters():
        layers.setdefault(name.rpartition(".")[0], []).append(p)
    rows = {name: [] for name in layers}
    for loss in losses:
        for name, own in layers.items():
            found = torch.autograd.grad(loss, own, retain_graph=True, allow_unused=True)
            rows[name].append(
                torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(own, found)])
            )
    return {name: torch.stack(own) for name, own in rows.items()}


def dense_steps(model, losses, damping):
    """(lambda I + 1/n sum u u^T)^-1 g by layer, dense, of the mean of these losses."""
    result = {}
    for name, u in rows_by_autograd(model, losses).items():
        fisher = u.T @ u / len(u) + damping * torch.eye(u.shape[1])
        result[name] = torch.linalg.solve(fisher, u.mean(0))
    return result


def steps_of(model, opt, loss):
    """The step of every layer [weights] over lr = 1."""
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss.backward()
    opt.step()
    layers = {}
    for name, p in model.named_parameters():
        layers.setdefault(name.rpartition(".")[0], []).append((start[name] - p.detach()).flatten())
    return {name: torch.cat(own) for name, own in layers.items()}


def seng(model, **options):
    return natgrad.SENG(
        model,
        length=natgrad.plain,
        **{"lr": 1.0, "momentum": 0.0, "damping": 0.1, "samples": None, "sketch": None, "refresh": 1, **options},
    )


@pytest.mark.parametrize("packed", [False, True])
def test_packed_sequences_have_the_rows_of_their_samples(packed):
    torch.manual_seed(0)
    x, y, lengths = sequences()
    lengths = lengths.sort(descending=True).values
    model = Recurrent(packed)
    losses = [F.cross_entropy(model(x[k : k + 1], lengths[k : k + 1]), y[k : k + 1]) for k in range(len(x))]
    expected = dense_steps(model, losses, 0.1)
    found = steps_of(model, seng(model), F.cross_entropy(model(x, lengths), y))
    for name, step in expected.items():
        assert_close(found[name], step, **EXACT)


class Experts(nn.Module):
    """Each sample goes to one of two experts; `slices` gives them views of the batch, else copies of what they take."""

    def __init__(self, slices):
        super().__init__()
        self.slices = slices
        self.a, self.experts, self.b = (
            nn.Linear(4, 5),
            nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)]),
            nn.Linear(5, 3),
        )

    def forward(self, x):
        h, first = torch.tanh(self.a(x)), len(x) // 3
        if self.slices:
            h = torch.cat([self.experts[0](h[:first]), self.experts[1](h[first:])])
        else:
            odd = torch.arange(len(x)) % 3 == 0
            out = torch.zeros_like(h)
            out[odd], out[~odd] = self.experts[0](h[odd]), self.experts[1](h[~odd])
            h = out
        return self.b(torch.tanh(h))


def per_sample_losses(model, x, y):
    """Each sample's own loss, from the whole batch's outputs (who goes where depends on the batch)."""
    return F.cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize("slices", [False, True])
def test_experts_are_normalised_by_the_samples_of_the_step(slices):
    torch.manual_seed(0)
    x, y = batch_of(0, 12)
    model = Experts(slices)
    expected = dense_steps(model, per_sample_losses(model, x, y), 0.1)
    opt = seng(model)
    found = quiet(steps_of, model, opt, F.cross_entropy(model(x), y))
    for name, step in expected.items():
        assert_close(found[name], step, **EXACT)
    kfac = natgrad.KFAC(clone(model), lr=0.1, rows_per_dim=None)
    own = kfac.cells[1].layer.module
    seen = []
    own.register_forward_hook(lambda m, a, out: (out.retain_grad(), seen.append((a[0], out)), None)[-1])
    F.cross_entropy(kfac._model(x), y).backward()
    quiet(kfac.step)
    ((a, out),) = seen
    a = torch.cat([a.detach(), torch.ones(len(a), 1)], 1)
    assert_close(statistic(kfac, "experts.0", "A")[0], a.T @ a / len(a))
    assert_close(statistic(kfac, "experts.0", "G")[0], 12 * out.grad.T @ out.grad)


@every_optimizer
def test_an_expert_without_samples_waits(kind):
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.rare, self.b = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x, some):
            h = torch.tanh(self.a(x))
            return self.b(torch.cat([self.rare(h[:some]), h[some:]]))

    torch.manual_seed(0)
    model = Sparse()
    opt = build(kind, model)
    start = model.rare.weight.detach().clone()
    with unwarned():
        for some in (0, 0, 5):
            x, y = batch_of(some)
            opt.zero_grad()
            F.cross_entropy(model(x, some), y).backward()
            opt.step()
    assert not torch.equal(model.rare.weight, start)
    assert all(row.covered for row in opt.coverage())


def test_one_block_for_the_network_places_slices_and_refuses_what_it_cannot_place():
    torch.manual_seed(0)
    x, y = batch_of(0, 12)
    model = Experts(slices=True)
    u = torch.cat(list(rows_by_autograd(model, per_sample_losses(model, x, y)).values()), 1)
    expected = torch.linalg.solve(u.T @ u / 12 + 0.1 * torch.eye(u.shape[1]), u.mean(0))
    found = quiet(steps_of, model, seng(model, block="network"), F.cross_entropy(model(x), y))
    assert_close(torch.cat(list(found.values())), expected, rtol=1e-8, atol=1e-12)
    other = Experts(slices=False)
    opt = seng(other, block="network")
    backward(other, (x, y))
    with pytest.raises(ValueError, match="needs the same samples in all layers"):
        quiet(opt.step)


# --- what a loss is a mean of ---


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def masked(n=8, places=6):
    x, y = torch.randn(n, places, 4), torch.randint(5, (n, places))
    y[torch.arange(places)[None] >= torch.randint(1, 4, (n, 1))] = -100
    return x, y, int((y >= 0).sum())


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("kind", [natgrad.KFAC, natgrad.SPNGD, natgrad.NLCG], ids=lambda kind: kind.__name__)
def test_a_mean_over_valid_tokens(kind, told):
    """G = V times the sum over tokens of hook gradients' products, V tokens in the mean."""
    torch.manual_seed(0)
    x, y, valid = masked()
    model = Tokens()
    opt = build(kind, model, damping=0.1)
    if told:
        opt.predictions = valid / len(x)
    out = model(x)
    out.retain_grad()
    F.cross_entropy(out.flatten(0, 1), y.flatten(), ignore_index=-100).backward()
    opt.step()
    g = out.grad.flatten(0, 1)
    assert_close(statistic(opt, "b", "G")[0], valid * g.T @ g, **EXACT)
    assert opt.assumed.samples == len(x)
    assert opt.assumed.predictions == pytest.approx(valid / len(x))
    assert ("predictions=" in opt.assumed.by) == told


def test_rows_of_sequences_with_padding():
    torch.manual_seed(0)
    x, y, valid = masked()
    model = Tokens()
    n = len(x)
    # a sequence's own loss is n/V times the sum over its tokens; its rows count V/n predictions
    losses = [F.cross_entropy(model(x[k]), y[k], ignore_index=-100, reduction="sum") * n / valid for k in range(n)]
    rows = {k: u * (valid / n) ** 0.5 for k, u in rows_by_autograd(model, losses).items()}
    found = steps_of(model, seng(model), F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-100))
    for name, u in rows.items():
        g = u.mean(0) * (n / valid) ** 0.5
        assert_close(found[name], torch.linalg.solve(u.T @ u / n + 0.1 * torch.eye(len(g)), g), **EXACT)


def test_a_mean_over_places_outside_of_the_model_is_one_prediction():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3)
    opt = natgrad.SPNGD(conv, lr=0.1)
    with unwarned():
        F.cross_entropy(conv(torch.randn(6, 2, 5, 5)).mean((2, 3)), torch.randint(3, (6,))).backward()
        opt.step()
    assert (opt.assumed.samples, opt.assumed.predictions) == (6, 1)


def test_a_head_outside_of_a_convolution_is_asked_about():
    torch.manual_seed(0)
    conv, head = nn.Conv2d(2, 3, 3), torch.randn(27, 3)
    opt = natgrad.SPNGD(conv, lr=0.1)
    F.cross_entropy(conv(torch.randn(6, 2, 5, 5)).flatten(1) @ head, torch.randint(3, (6,))).backward()
    with pytest.warns(natgrad.NatgradWarning, match="a mean over 9 places of each sample.*predictions=1"):
        opt.step()
    assert "9 predictions of each" in str(opt.assumed)


def test_time_first_is_known_from_the_modules_or_told():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)  # batch_first=False
    model = nn.Sequential(layer)
    x, y = torch.randn(7, 5, 4), torch.randint(4, (7, 5))
    opt = quiet(seng, model, lr=1e-30)
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    quiet(opt.step)
    assert opt.assumed.samples == 5
    norm = next(c for c in opt.cells if c.name == "0.norm2")
    losses = [F.cross_entropy(model(x[:, k : k + 1]).flatten(0, 1), y[:, k]) for k in range(5)]
    u = torch.stack(
        [torch.stack(torch.autograd.grad(loss, [layer.norm2.weight, layer.norm2.bias]), -1) for loss in losses]
    )
    found = norm.kept()["columns"] * 5**0.5 / 7**0.5
    assert_close(found, u.flatten(1), **EXACT)


@pytest.mark.parametrize("dim", [1, {"": 1}, {"b": 1, "a": 1}])
def test_the_dimension_of_samples_is_told(dim):
    torch.manual_seed(0)
    model = Tokens()
    x, y = torch.randn(8, 6, 4), torch.randint(5, (8, 6))
    first, _ = after(natgrad.SENG, model, lambda o, opt, k: F.cross_entropy(o(x).flatten(0, 1), y.flatten()).backward())
    turned = lambda o, opt, k: F.cross_entropy(o(x.transpose(0, 1)).flatten(0, 1), y.T.flatten()).backward()  # noqa: E731
    found, n = after(natgrad.SENG, model, turned, batch_dim=dim)
    assert n == 8
    assert_close(found, first, **EXACT)
    wrong, n = after(natgrad.SENG, model, turned)
    assert n == 6
    assert not torch.allclose(wrong, first)


def test_a_batch_dim_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="batch_dim=-1"):
        natgrad.SPNGD(mlp(), lr=0.1, batch_dim=-1)
    with pytest.raises(ValueError, match="the model has no module 'heads'"):
        natgrad.SPNGD(mlp(), lr=0.1, batch_dim={"heads": 1})


def test_layers_that_disagree_about_samples_are_named_once():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.w, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 3)

        def forward(self, x):
            h = torch.tanh(self.a(x.reshape(len(x), 8)[:, :4]))
            h = self.w(torch.cat([h, -h[:4]]))  # windows of some samples only
            return self.b(torch.cat([h[: len(x)], h[-len(x) :]], 1))

    torch.manual_seed(0)
    model = Windows()
    opt = natgrad.SPNGD(model, lr=0.01, refresh=1)
    said = []
    for _ in range(3):
        x = torch.randn(6, 2, 4)
        with heard() as found:
            backward(model, (x, torch.randint(3, (6,))))
            opt.step()
            opt.zero_grad()
        said += [str(w.message) for w in found]
    assert len(said) == 1
    assert "layers disagree about the samples of a step: 6 in most, 10 in w" in said[0]


def test_a_layer_called_once_for_the_whole_batch_is_not_curved_by_sums():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.places, self.head = nn.Embedding(9, 4), nn.Embedding(5, 4), nn.Linear(20, 3)

        def forward(self, i):
            return self.head(torch.maximum(self.tokens(i), self.places(torch.arange(5)[None])).flatten(1))

    torch.manual_seed(0)
    model = Positions()
    opt = natgrad.SPNGD(model, lr=0.01, refresh=1)
    start = model.places.weight.detach().clone()
    said = []
    for _ in range(6):
        with heard() as found:
            backward(model, (torch.randint(9, (8, 5)), torch.randint(3, (8,))))
            opt.step()
            opt.zero_grad()
        said += [str(w.message) for w in found]
    assert len(said) == 2
    assert "places: it is called once for the whole batch" in said[0]
    assert "after 5 measurements in a row it will train by the fallback" in said[0]
    assert "5 times in a row; so without curvature" in said[1]
    assert {row.layer: row.covered for row in opt.coverage()} == {"tokens": True, "places.weight": False, "head": True}
    assert not torch.equal(model.places.weight, start)


def test_a_loss_that_looks_like_a_sum_is_asked_about():
    model = mlp()
    opt = natgrad.SPNGD(model, lr=1e-4)
    backward(model, batch_of(0, 64), reduction="sum")
    with pytest.warns(natgrad.NatgradWarning, match='looks like a sum over samples.*reduction="sum"'):
        opt.step()
    for options, reduction in (({}, "mean"), ({"reduction": "sum"}, "sum")):
        own = mlp()
        opt = natgrad.SPNGD(own, lr=1e-4, **options)
        with unwarned():
            backward(own, batch_of(0, 64), reduction=reduction)
            opt.step()


@every_optimizer
def test_a_summed_loss_steps_as_a_mean_with_its_share_of_the_rate(kind):
    """Also SENG's rows, and NLCG's curvature."""
    model, n = mlp(), 16
    mean = after(kind, model, lambda o, opt, k: backward(o, batch_of(k)), steps=3)
    total = after(
        kind, model, lambda o, opt, k: backward(o, batch_of(k), reduction="sum"), steps=3, reduction="sum", lr=0.1 / n
    )
    assert_close(total[0], mean[0], rtol=1e-8, atol=1e-12)


# --- labels drawn from the prediction ---


def sampled_fisher(model, x, likelihood, draws=400):
    """The mean over draws of the G of the last layer of `model`."""
    values = []
    for seed in range(draws):
        opt = natgrad.KFAC(model, lr=1e-30, rows_per_dim=None, fisher="sampled", seed=seed, ema_decay=0.0)
        out = model(x)
        opt.sample(out, likelihood)
        out.sum().backward()
        quiet(opt.step)
        opt.zero_grad()
        values.append(opt.cells[-1].state()["G"][0].clone())
    return torch.stack(values).mean(0)


@pytest.mark.slow
def test_a_bernoulli_of_one_logit():
    model, x = nn.Sequential(nn.Linear(4, 1)), batch_of(0)[0]
    p = model(x).detach().sigmoid()
    assert_close(sampled_fisher(model, x, "bernoulli"), (p * (1 - p)).mean().view(1, 1), rtol=0.05, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("variance", [1.0, 0.25])
def test_a_normal_distribution_of_known_variance(variance):
    model, x = nn.Sequential(nn.Linear(4, 2)), batch_of(0)[0]
    likelihood = "normal" if variance == 1 else natgrad.optim.Normal(variance)
    found = sampled_fisher(model, x, likelihood)
    assert_close(found, torch.eye(2) / variance, rtol=0.1, atol=0.1 / variance)


@pytest.mark.slow
def test_several_heads_by_a_function_of_the_user():
    """A policy and a value: the Fisher of both, block by block."""
    model = ActorCritic()
    x = batch_of(0)[0]

    def draw(outputs):
        logits, value = outputs
        action = torch.distributions.Categorical(logits=logits.detach()).sample()
        target = value.detach() + torch.randn_like(value)
        return F.cross_entropy(logits, action, reduction="none") + 0.5 * (value - target).square()

    values = []
    for seed in range(400):
        torch.manual_seed(seed)
        opt = natgrad.KFAC(model, lr=1e-30, rows_per_dim=None, fisher="sampled")
        outputs = model(x)
        opt.sample(outputs, draw)
        (outputs[0].sum() + outputs[1].sum()).backward()
        quiet(opt.step)
        opt.zero_grad()
        values.append([statistic(opt, name, "G")[0].clone() for name in ("policy", "value")])
    p = model(x)[0].detach().softmax(1)
    exact = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)).mean(0)
    policy, value = (torch.stack(found).mean(0) for found in zip(*values))
    assert_close(policy, exact, rtol=0.2, atol=0.01)
    assert_close(value, torch.eye(1), rtol=0.1, atol=0)


def test_what_cannot_be_drawn_is_refused_and_what_is_left_out_is_said():
    model = ActorCritic()
    opt = natgrad.KFAC(model, lr=0.1, fisher="sampled")
    logits, value = model(batch_of(0)[0])
    with pytest.raises(ValueError, match=r'shape \(16,\).*likelihood="bernoulli"'):
        opt.sample(value)
    with pytest.raises(ValueError, match="got tuple: pass the logits, or a function"):
        opt.sample((logits, value))
    with pytest.raises(ValueError, match="likelihood='poisson': give one of categorical, bernoulli, normal"):
        opt.sample(logits, "poisson")
    with pytest.raises(ValueError, match="each sample's loss"):
        opt.sample(logits, lambda out: out.sum())
    opt.sample(logits)
    (logits.sum() + value.sum()).backward()
    with pytest.warns(natgrad.NatgradWarning, match="value: its output does not enter the prediction"):
        opt.step()


def test_labels_that_were_drawn_survive_clearing_before_the_backward_pass():
    """Forward, draw, zero_grad, backward: the order of several trainers."""
    model = mlp()
    ends = []
    for late in (False, True):
        own = clone(model)
        opt = natgrad.SPNGD(own, lr=0.1, fisher="sampled", refresh=1)
        for step in range(3):
            x, y = batch_of(step)
            if not late:
                opt.zero_grad()
            out = own(x)
            opt.sample(out)
            if late:
                opt.zero_grad()
            F.cross_entropy(out, y).backward()
            opt.step()
        ends.append(weights(own))
    assert torch.equal(*ends)


# --- what a review with fresh eyes found ---


class Steps(nn.Module):
    """A recurrent network whose head is called at every step, or once."""

    def __init__(self, each):
        super().__init__()
        self.each, self.cell, self.head = each, nn.Linear(7, 3), nn.Linear(3, 5)

    def forward(self, x):
        h, states = x.new_zeros(len(x), 3), []
        for t in range(x.shape[1]):
            h = torch.tanh(self.cell(torch.cat([x[:, t], h], 1)))
            states.append(h)
        return torch.stack([self.head(h) for h in states], 1) if self.each else self.head(torch.stack(states, 1))


@every_optimizer
def test_a_head_called_at_every_step_makes_the_predictions_of_all(kind):
    ends = []
    for each in (False, True):
        torch.manual_seed(0)
        model = Steps(each)

        def passes(own, opt, step):
            torch.manual_seed(step)
            F.cross_entropy(own(torch.randn(8, 6, 4)).flatten(0, 1), torch.randint(5, (48,))).backward()

        own = clone(model)
        opt = build(kind, own)
        for step in range(2):
            passes(own, opt, step)
            assert said_by(opt.step) == []
            opt.zero_grad()
        assert opt.assumed.predictions == 6
        ends.append(weights(own))
    assert_close(*ends, rtol=1e-7, atol=1e-10)


def test_numbers_of_each_place_are_predictions():
    """A model that returns the logarithms of its tokens' probabilities, one a place."""

    class Logs(Tokens):
        def forward(self, x):
            return super().forward(x).log_softmax(-1)[..., 0]

    torch.manual_seed(0)
    model = Logs()
    opt = build(natgrad.SPNGD, model)
    (-model(torch.randn(8, 6, 4)).mean()).backward()
    opt.step()
    assert opt.assumed.predictions == 6


def test_calls_outside_of_the_model_before_one_backward_pass_are_asked_about():
    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def act(self, x):
            return self.inner(x)

    model = Policy()
    opt = build(natgrad.SPNGD, model)
    x, y = batch_of(0)
    F.cross_entropy(torch.cat([model.act(part) for part in x.chunk(4)]), y).backward()
    (text,) = said_by(opt.step)
    assert text.startswith("layers outside")


@pytest.mark.parametrize("where", ["around the model", "inside, with a loss"])
def test_checkpoints_that_are_computed_again_belong_to_their_own_forward_pass(where):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x, y=None):
            if y is None:
                return self.head(torch.tanh(self.body(x)))
            h = checkpoint(lambda v: torch.tanh(self.body(v)), x, use_reentrant=reentrant)
            return F.cross_entropy(self.head(h), y)

    torch.manual_seed(0)
    model, ends, reentrant = Inner(), [], True
    for turn in (True, False):
        reentrant = turn

        def passes(own, opt, step, reentrant=turn):
            x, y = batch_of(step, 24)
            parts = [(a.clone().requires_grad_(), b) for a, b in zip(x.chunk(3), y.chunk(3))]
            if where == "around the model":
                losses = [F.cross_entropy(checkpoint(own, a, use_reentrant=reentrant), b) for a, b in parts]
            else:
                losses = [own(a, b) for a, b in parts]
            (sum(losses) / 3).backward()

        final, n = after(natgrad.SPNGD, model, passes)
        assert n == 24
        ends.append(final)
    assert_close(*ends, **EXACT)


@every_optimizer
def test_a_backward_pass_that_fails_and_is_cleared_leaves_nothing(kind):
    """The gradient of the head's output is known and its weight's is not when the error comes."""

    def failing(own, opt, step):
        guard = own[0].register_full_backward_hook(lambda *_: 1 / 0)
        out = own(batch_of(9)[0])
        with pytest.raises(ZeroDivisionError):
            out.sum().backward()
        guard.remove()
        own.zero_grad()
        backward(own, batch_of(step))

    model = mlp()
    expected = after(kind, model, lambda own, opt, step: backward(own, batch_of(step)))
    found = after(kind, model, failing)
    assert found[1] == expected[1] == 16
    assert_close(found[0], expected[0], **EXACT)


def test_an_interrupt_in_a_forward_pass_is_forgotten_by_the_next_step():
    """torch calls no hook when it is not an Exception that ends a forward pass."""
    model = nn.Sequential(mlp())
    opt = build(natgrad.SPNGD, model)
    hook = model[0][1].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        model(batch_of(0)[0])
    hook.remove()
    for _ in range(2):
        opt.zero_grad()
        for part in zip(*(t.chunk(2) for t in batch_of(1))):
            backward(model, part)
        opt.step()
    assert opt.engine.samples == 16


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Conv2d(3, 3, 3, padding=1), (0, 3, 4, 4)),
        (lambda: nn.GroupNorm(1, 3), (0, 3, 4, 4)),
        (lambda: nn.LayerNorm(3), (0, 5, 3)),
        (lambda: nn.Linear(3, 3), (0, 3)),
    ],
    ids=["conv", "group norm", "layer norm", "linear"],
)
@every_optimizer
def test_layers_on_no_samples_wait(kind, layer, shape):
    class Rare(nn.Module):
        def __init__(self):
            super().__init__()
            self.rare, self.main = layer(), mlp()

        def forward(self, x):
            return self.main(x) + self.rare(x.new_zeros(shape)).sum()

    model = Rare()
    opt = build(kind, model)
    for step in range(2):
        opt.zero_grad()
        backward(model, batch_of(step))
        assert said_by(opt.step) == []


def test_places_are_not_taken_for_tokens():
    """Positions 0, 1, 2, ... of one dimension, as many as there are samples: each sample has all of them."""

    class Gpt(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.place, self.head = nn.Embedding(9, 4), nn.Embedding(8, 4), nn.Linear(4, 9)

        def forward(self, i):
            return self.head(torch.tanh(self.token(i) + self.place(torch.arange(i.shape[1]))))

    torch.manual_seed(0)
    model = Gpt()
    opt = build(natgrad.KFAC, model)
    for _ in range(6):
        i = torch.randint(9, (8, 8))
        opt.zero_grad()
        F.cross_entropy(model(i).flatten(0, 1), i.flatten()).backward()
        quiet(opt.step)
    assert {row.layer: row.covered for row in opt.coverage()} == {"token": True, "place": True, "head": True}
    assert_close(statistic(opt, "place", "A"), torch.full((1, 8), 1 / 8, dtype=torch.float64), check_dtype=False)


def test_samples_without_a_gradient_are_asked_about():
    model = nn.Sequential(nn.Linear(4, 1))
    opt = natgrad.SENG(model, lr=0.1)
    x = batch_of(0)[0]
    torch.relu(1 - 3 * model(x)[:, 0]).mean().backward()
    (text,) = said_by(opt.step)
    assert text.startswith("some samples: ")
    assert "predictions=1" in text


def test_modules_with_time_first_put_the_layers_around_them_in_question():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn, self.head = nn.Embedding(9, 4), nn.LSTM(4, 4), nn.Linear(4, 9)

        def forward(self, i):
            return self.head(self.rnn(self.embed(i))[0])

    torch.manual_seed(0)
    for options, count in (({}, 1), ({"batch_dim": 1}, 0)):
        model = Words()
        opt = quiet(natgrad.KFAC, model, lr=0.1, **options)
        i = torch.randint(9, (7, 5))
        F.cross_entropy(model(i).flatten(0, 1), i.flatten()).backward()
        said = said_by(opt.step)
        assert len(said) == 2 * count  # the modules themselves are known, and disagree with those around them
        assert sum(text.startswith("time first") for text in said) == count
        assert opt.assumed.samples == (7 if count else 5)


def test_labels_of_several_passes_and_of_one_output_twice():
    """Each output is scaled by its own labels, whatever else was computed in between."""
    model = ActorCritic()
    x = batch_of(0, 64)[0]
    found = []
    for between in (0, 1, 10):
        opt = natgrad.KFAC(model, lr=1e-30, rows_per_dim=None, fisher="sampled", ema_decay=0.0)
        out = model(x)[0]
        if between:
            model(x[:between])
        opt.sample(out)
        out.sum().backward()
        quiet(opt.step)
        opt.zero_grad()
        found.append(statistic(opt, "policy", "G").clone())
    assert_close(found[1], found[0], **EXACT)
    assert_close(found[2], found[0], **EXACT)
    opt = natgrad.KFAC(model, lr=1e-30, rows_per_dim=None, fisher="sampled")
    (one, value), (other, _) = model(x[:32]), model(x[32:])
    opt.sample(one)
    opt.sample(other)
    with pytest.raises(ValueError, match="called before for this forward pass"):
        opt.sample(value, "normal")
    (one.sum() + other.sum()).backward()
    quiet(opt.step)
    assert opt.assumed.samples == 64
    model(x)
    stranger = torch.randn(8, 3, requires_grad=True) * 1
    with pytest.raises(ValueError, match="does not come from the model"):
        opt.sample(stranger)


def test_labels_may_be_drawn_for_a_pass_in_which_nothing_that_is_due_is_used():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x, second):
            return (self.two if second else self.one)(torch.tanh(self.body(x)))

    model = Heads()
    opt = build(natgrad.KFAC, model, refresh=3, fisher="sampled")
    for step in range(9):
        x, y = batch_of(step)
        output = model(x, step % 2)
        opt.sample(output)
        F.cross_entropy(output, y).backward()
        quiet(opt.step)
        opt.zero_grad()
    assert row_covered(opt, "one")
    assert row_covered(opt, "two")


def test_a_hook_comes_back_with_a_layer_that_was_frozen_for_a_while():
    class Doubled(nn.Linear):
        twice = False

        def forward(self, x):
            return super().forward(x)

    model = mlp()
    opt = build(natgrad.KFAC, model, refresh=2)
    for step in range(9):
        model[0].requires_grad_(step not in (2, 3, 4))
        backward(model, batch_of(step))
        quiet(opt.step)
        opt.zero_grad()
    assert row_covered(opt, "0")
    inner = type(model[0]).forward
    model[0].forward = lambda x: inner(model[0], x) + Opaque.apply(x, model[0].weight)
    for step in range(4):
        backward(model, batch_of(step))
        quiet(opt.step)
        opt.zero_grad()
    assert not row_covered(opt, "0")


def row_covered(opt, name):
    return any(row.covered for row in opt.coverage() if row.layer == name)


@pytest.mark.parametrize("rows", [4_096, 65_536])
def test_a_frequent_token_is_added_up_one_by_one_and_agrees(rows):
    """torch adds the gradients of one token up in a row, in single precision."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(3, 8), nn.Linear(8, 3))
    opt = natgrad.SPNGD(model, lr=1e-3)
    i = (torch.rand(rows, 4) < 0.01).long()
    F.cross_entropy(model(i).mean(1), torch.randint(3, (rows,))).backward()
    assert said_by(opt.step) == []
    assert all(row.covered for row in opt.coverage())


def test_a_state_whose_layers_had_been_loosened_keeps_the_rows_of_those_behind():
    ends = []
    for resumed in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
        opt = build(natgrad.SENG, model, refresh=3)
        broken = model[2].register_forward_pre_hook(lambda m, a: None)
        opt.loosen({1: "for this test"}) if not resumed else None
        opt.engine.arm(1)
        for step in range(2):
            if resumed and step == 0:
                opt.loosen({1: "for this test"})
                opt.engine.arm(1)
            backward(model, batch_of(step))
            opt.step()
            opt.zero_grad()
        if resumed:
            other = build(natgrad.SENG, model, refresh=3)
            quiet(other.load_state_dict, opt.state_dict())
            opt = other
        broken.remove()
        for step in range(2, 4):
            backward(model, batch_of(step))
            opt.step()
            opt.zero_grad()
        ends.append(weights(model))
    assert torch.equal(*ends)
