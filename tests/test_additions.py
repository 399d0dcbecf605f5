"""What a user adds is one class in a file of their own: a layer, a curvature, a refresh rule, a rule, a length."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import natgrad
from helpers import backward, clone, points, train, weights
from natgrad.curvature.curvature import Cost, Curvature
from natgrad.curvature.kronecker import OutputMoment
from natgrad.layers.layer import layer_of
from natgrad.layers.linear import Linear
from natgrad.parallel import run_threads
from natgrad.refresh import History, Staleness


class Flipped(nn.Module):
    """A linear map of the features in reverse order."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return F.linear(x.flip(-1), self.weight, self.bias)


class FlippedLayer(Linear):
    """`Flipped` as rows: those of the reversed input."""

    def rows(self, x, index=None):
        return super().rows(x.flip(-1), index)

    def projected(self, x, u):
        return super().projected(x.flip(-1), u)


@dataclass(frozen=True)
class Outputs(Curvature):
    """I (x) G: the curvature of the outputs alone."""

    samples: int | None = None
    name: str = field(default="outputs", init=False)

    @property
    def statistics(self):
        return (OutputMoment(self.samples),)

    def split(self, traces, damping):
        return {"G": torch.full_like(traces["G"], damping)}

    def factor(self, key, statistic, damping):
        eye = torch.eye(statistic.shape[-1], dtype=statistic.dtype)
        return torch.linalg.inv(statistic + damping[:, None, None] * eye), None

    def precondition(self, inverses, gradient, damping):
        return inverses["G"] @ gradient

    def dense(self, statistics, shape, damping):
        eye = torch.eye(shape.out, dtype=statistics["G"].dtype)
        return torch.kron(statistics["G"][0] + damping * eye, torch.eye(shape.inner, dtype=eye.dtype))

    def cost(self, layer, rows):
        b, o, i = layer.shape
        return Cost(float(rows * b * o * o), {"G": float(b * o**3)}, float(b * o * o * i), b * o * o)


@dataclass(frozen=True)
class Doubling(Staleness):
    """Twice as long after every measurement."""

    def next(self, memory: History) -> int:
        return 2 * memory.interval


class Nesterov:
    """Momentum that looks ahead."""

    def allocate(self, layer, state):
        state["speed"] = torch.zeros(layer.shape)

    def __call__(self, segments, natural, world):
        for segment, curved in zip(segments, natural(segments, [s.gradient for s in segments])):
            speed = segment.state["speed"].mul_(segment.group["momentum"]).add_(curved)
            segment.direction = curved + segment.group["momentum"] * speed


def unit(segments, world):
    """Every layer's direction at length one."""
    return [1 / segment.norms(segment.direction) for segment in segments]


def network():
    torch.manual_seed(0)
    return nn.Sequential(Flipped(4, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.fixture
def known():
    layer_of.register(Flipped, FlippedLayer)
    yield
    registry = layer_of.registry
    assert registry[Flipped] is FlippedLayer
    layer_of.register(Flipped, lambda module: "no longer known")


def with_all(model, world=None):
    return natgrad.SPNGD(
        model,
        lr=0.05,
        momentum=0.8,
        rows_per_dim=None,
        curvature=lambda layer, samples, max_size: (
            natgrad.curvature.Identity() if layer.kind == "loose" else Outputs(samples)
        ),
        refresh=Doubling(),
        rule=Nesterov(),
        length=unit,
        world=world,
    )


def test_a_layer_of_your_own_is_what_it_computes(known, double):
    """Training it is training a linear layer whose columns are reversed."""
    model = network()
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        for p, q in zip(plain.parameters(), model.parameters()):
            p.copy_(q)
        plain[0].weight.copy_(model[0].weight.flip(-1))
    batches = [points(16, k, torch.float64) for k in range(5)]
    for m in (model, plain):
        opt = natgrad.SPNGD(m, lr=0.1, rows_per_dim=None, refresh=2)
        assert all(row.covered for row in opt.coverage())
        train(opt, m, batches)
    assert_close(model[0].weight.flip(-1), plain[0].weight)
    assert_close(model[2].weight, plain[2].weight)


def test_one_of_each_together(known, double):
    """Against the same made by hand: every step from G of the last measurement."""
    model = network()
    opt = with_all(model)
    by_hand, measured, speed = clone(model), {}, {}
    for step in range(7):
        batch = points(16, step, torch.float64)
        outputs = forwards(by_hand, batch)
        for name, (layer, dy) in outputs.items():
            if step in (0, 2, 6):  # intervals 2, 4, 8
                measured[name] = 16 * dy.T @ dy
            gradient = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
            damped = measured[name] + 3e-4 * torch.eye(len(gradient))
            curved = torch.linalg.solve(damped, gradient)
            speed[name] = 0.8 * speed.get(name, 0.0) + curved
            direction = curved + 0.8 * speed[name]
            direction = 0.05 * direction / direction.norm()
            with torch.no_grad():
                layer.weight.sub_(direction[:, :-1])
                layer.bias.sub_(direction[:, -1])
        backward(model, batch)
        opt.step()
        opt.zero_grad()
    assert_close(weights(model), weights(by_hand))
    assert set(opt.intervals().values()) == {8}


def forwards(model, batch):
    """Gradients of the mean loss, and of the layers' outputs [n, o]."""
    model.zero_grad()
    found = {}

    def keep(name):
        def hook(module, args, output):
            output.register_hook(lambda dy: found.__setitem__(name, (module, dy)))

        return hook

    handles = [model[k].register_forward_hook(keep(k)) for k in (0, 2)]
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    for handle in handles:
        handle.remove()
    return found


def test_one_of_each_on_ranks(known, double):
    start = network()

    def work(world):
        model = clone(start)
        opt = with_all(model, world)
        for step in range(6):
            batch = points(16, step, torch.float64)
            backward(model, tuple(t.chunk(world.size)[world.rank] for t in batch))
            opt.step()
            opt.zero_grad()
        return weights(model)

    (alone,) = run_threads(1, work)
    for other in run_threads(2, work):
        assert_close(other, alone, rtol=1e-9, atol=1e-11)


def test_a_state_of_your_own_is_saved(known):
    model = network()
    opt = with_all(model)
    train(opt, model, [points(16, k) for k in range(3)])
    other = clone(model)
    again = with_all(other)
    again.load_state_dict(opt.state_dict())
    for o, m in ((opt, model), (again, other)):
        train(o, m, [points(16, k) for k in range(3, 6)])
    assert torch.equal(weights(other), weights(model))


class Counting:
    """Adam on natural gradients, with a count of its own for every layer."""

    def allocate(self, layer, state):
        state["mean"], state["square"] = torch.zeros(layer.shape), torch.zeros(layer.shape)
        state["times"] = torch.tensor(0)

    def __call__(self, segments, natural, world):
        for segment, curved in zip(segments, natural(segments, [s.gradient for s in segments])):
            state = segment.state
            state["times"] += 1
            times = int(state["times"])
            state["mean"].lerp_(curved, 0.1)
            state["square"].lerp_(curved * curved, 0.01)
            root = (state["square"] / (1 - 0.99**times)).sqrt() + 1e-8
            segment.direction = state["mean"] / (1 - 0.9**times) / root


def test_a_rule_counts_the_steps_of_each_layer():
    """Numbers of a layer are read as they were just written, and make the layer a segment of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 3))
    opt = natgrad.KFAC(model, lr=0.01, rule=Counting(), length=natgrad.plain)
    start = [p.detach().clone() for p in model.parameters()]
    for step in range(4):
        backward(model, points(16, step))
        opt.step()
        opt.zero_grad()
        if step == 0:  # the first direction of Adam is a sign
            moved = torch.cat([(p - s).flatten() for p, s in zip(model.parameters(), start)]).abs()
            assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-3, atol=1e-5)
    opt.settle()
    assert [int(cell.state()["times"]) for cell in opt.cells] == [4] * 4
