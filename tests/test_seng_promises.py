"""What users rely on, where SENG differs from the others: states that grow, dampings at once, outputs of all kinds."""

import copy

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn import functional as F
from torch.testing import assert_close

import natgrad
from helpers import Mixed, Net, clone, mlp, points, quiet, train, weights
from multi import SAME, run, share
from natgrad.parallel import run_threads

ROW_STATE = {"U", "U_inverse", "U_mean", "U_columns", "U_left", "U_right", "U_tokens", "U_sketched", "U_drawn"}


def seng(model, **options):
    settings = {"lr": 0.1, "damping": 0.5, "samples": None, "refresh": 3, "sketch": natgrad.curvature.CountSketch(30)}
    return natgrad.SENG(model, **{**settings, **options})


def resumed(saved, model, world, k, **options):
    mine = clone(model)
    opt = seng(mine, world=world, **options)
    opt.load_state_dict(saved)
    train(opt, mine, [share(Mixed.batch(24, j), world) for j in range(k, k + 4)])
    return weights(mine)


@pytest.mark.parametrize("block", ["layer", "network"])
def test_states_move_between_worlds(block, double):
    start = Mixed()

    def begin(world):
        model = clone(start)
        opt = seng(model, world=world, block=block)
        train(opt, model, [share(Mixed.batch(24, k), world) for k in range(4)])
        return model, opt.gather_state_dict()

    model, saved = run_threads(2, begin)[1]
    assert any(key in ROW_STATE for state in saved["state"].values() for key in state)
    expected = run_threads(1, lambda world: resumed(saved, model, world, 4, block=block))[0]
    for ranks, owners in ((2, True), (3, True), (2, False)):
        ends = run_threads(ranks, lambda world: resumed(saved, model, world, 4, block=block), owners=owners)
        assert_close(ends[0], expected, rtol=1e-9, atol=1e-10)
        assert all(torch.equal(end, ends[0]) for end in ends)


def test_rows_that_a_checkpoint_has_lost_are_measured_again(double):
    """As after a distributed checkpoint that was asked for by an optimizer that had not measured yet."""
    start = Mixed()
    opt = seng(model := clone(start))
    train(opt, model, [Mixed.batch(24, k) for k in range(2)])
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        for name in ROW_STATE & state.keys():
            del state[name]

    def work(world):
        mine = clone(model)
        other = seng(mine, world=world)
        other.load_state_dict(saved)
        train(other, mine, [share(Mixed.batch(24, k), world) for k in range(2, 6)])
        return weights(mine), other.intervals(), other.refreshed

    for ranks in (1, 2):
        results = run_threads(ranks, work)
        assert bool(torch.isfinite(results[0][0]).all())
        assert all(torch.equal(final, results[0][0]) for final, *_ in results)
        assert not torch.equal(results[0][0], weights(model))


def test_loading_an_older_state_forgets_newer_rows():
    model = mlp()
    opt = seng(model)
    early = copy.deepcopy(opt.state_dict())
    train(opt, model, [points(16, 0)])
    opt.load_state_dict(early)
    assert not any(key in ROW_STATE for state in opt.state.values() for key in state)
    train(opt, model, [points(16, 1)])


@pytest.mark.parametrize("block", ["layer", "network"])
def test_a_new_damping_acts_at_once(block, double):
    start, batch = mlp().double(), points(16, 0, torch.float64)
    ends = []
    for first in (0.5, 0.51):
        model = clone(start)
        opt = seng(model, damping=first, momentum=0.0, block=block, lr=1e-9)
        train(opt, model, [batch])
        opt.param_groups[0].update(damping=0.51, lr=0.1)
        train(opt, model, [points(16, 1, torch.float64)])
        ends.append(weights(model))
    assert_close(*ends, rtol=1e-7, atol=1e-9)


def test_one_solve_takes_one_damping():
    model = mlp()
    groups = [{"params": [*model[0].parameters()], "damping": 0.1}, {"params": [*model[2].parameters()]}]
    opt = seng(model, params=groups, block="network")
    with pytest.raises(ValueError, match=r"damping \[0.1, 0.5\].*block=\"layer\""):
        train(opt, model, [points(8, 0)])


class Folding(nn.Module):
    """The first layer is given halves of samples, in one line or as places."""

    def __init__(self, line=True, output=lambda logits: logits):
        super().__init__()
        self.line, self.output, self.first, self.last = line, output, nn.Linear(2, 4), nn.Linear(8, 3)

    def forward(self, x):
        halves = torch.tanh(self.first(x.view(-1, 2) if self.line else x.view(-1, 2, 2)))
        return self.output(self.last(halves.view(len(x), -1)))


@pytest.mark.parametrize("options", [{}, {"block": "network"}, {"columns": "improved"}], ids=str)
def test_halves_of_samples_in_one_line_are_places(double, options):
    ends, start = [], Folding(True).state_dict()
    for line in (True, False):
        model = Folding(line)
        model.load_state_dict(start)
        train(seng(model, **options), model, [points(8, k, torch.float64) for k in range(4)])
        ends.append(weights(model))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


class Half(nn.Module):
    """The first layer sees half of the samples."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        n = len(x) // 2
        return self.last(torch.cat([torch.tanh(self.first(x[:n])), x[n:]]))


def test_layers_that_see_other_samples(double):
    model = Half()
    quiet(train, seng(model), model, [points(8, k, torch.float64) for k in range(4)])  # columns of its own
    with pytest.raises(ValueError, match=r"there are 4 to 8.*block=\"layer\""):
        quiet(train, seng(model, block="network"), model, [points(8, 0, torch.float64)])
    with pytest.raises(ValueError, match=r"they have 8 samples, a layer has 4"):
        quiet(train, seng(model, columns="improved"), model, [points(8, 0, torch.float64)])


class Answer(dict):
    """What transformers return."""


@pytest.mark.parametrize("wrap", [lambda z: (z, None), lambda z: Answer(hidden=z * 2, logits=z), lambda z: [z]])
def test_logits_are_found_among_outputs(wrap, double):
    torch.manual_seed(0)
    start, ends = mlp().double(), []

    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return wrap(self.inner(x))

    x, y = points(16, 0, torch.float64)
    for model in (clone(start), Wrapped(clone(start))):
        opt = seng(model, columns="improved")
        out = model(x)
        logits = out if isinstance(out, torch.Tensor) else out["logits"] if isinstance(out, dict) else out[0]
        F.cross_entropy(logits, y).backward()
        opt.step()
        ends.append(weights(model))
    assert torch.equal(*ends)


def test_no_logits_are_refused_in_one_line():
    model = Folding(output=lambda logits: {"loss": logits.square().sum()})
    opt = seng(model, columns="improved")
    model(points(8, 0)[0])["loss"].backward()
    with pytest.raises(ValueError, match=r"none were seen.*columns=\"empirical\"") as error:
        opt.step()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"refresh": natgrad.Adaptive()}, "give a number of steps"),
        ({"columns": "true"}, "columns='true'"),
        ({"block": "all"}, "block='all'"),
        ({"rank": 0}, "rank=0"),
        ({"budget": 0}, "budget=0"),
        ({"samples": 0}, "samples=0"),
        ({"legacy": natgrad.curvature.Legacy(local=True), "block": "network"}, "leave block"),
    ],
)
def test_what_cannot_be_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        seng(mlp(), **options)


@pytest.mark.parametrize("name", ["ema_decay", "fisher", "curvature", "max_size"])
def test_what_it_has_not_is_not_taken(name):
    with pytest.raises(TypeError, match=name):
        seng(mlp(), **{name: None})


def test_a_scaled_loss_gives_the_same_steps():
    model = mlp()
    other, batches = clone(model), [points(16, k) for k in range(5)]
    train(seng(model), model, batches)
    opt, scaler = seng(other), GradScaler("cpu", init_scale=256.0)
    for k, (x, y) in enumerate([batches[0], *batches]):
        scaler.scale(F.cross_entropy(other(x), y) * (float("inf") if k == 0 else 1)).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    assert opt.skipped == 1
    assert_close(weights(other), weights(model), rtol=1e-4, atol=1e-6)


def test_layers_unused_on_some_ranks(double):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.left, self.right = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            h = torch.tanh(self.body(x))
            left = x[:, :1] < 0
            if bool(left.all()):
                return self.left(h)
            return self.right(h) if not bool(left.any()) else torch.where(left, self.left(h), self.right(h))

    x = torch.randn(12, 4)
    x[:, 0] = torch.cat([-torch.ones(6), torch.ones(6)])
    batches = [(x * (1 + k / 10), torch.randint(4, (12,))) for k in range(4)]
    start = Branches()
    for block, columns in (("layer", "empirical"), ("network", "empirical"), ("network", "improved")):
        options = {"sketch": None, "block": block, "columns": columns}
        one, two = (run(n, start, batches, lambda m, world, o=options: seng(m, world=world, **o)) for n in (1, 2))
        assert_close(two[0][0], one[0][0], **SAME)


@pytest.mark.parametrize("owners", [True, False])
@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16], ids=str)
def test_rows_travel_in_half_precision(wire, owners):
    start, batches = Mixed(), [Mixed.batch(24, k) for k in range(3)]

    def work(world):
        model = clone(start)
        opt = seng(model, world=world, refresh=1, sketch=None)
        train(opt, model, [share(batch, world) for batch in batches])
        return weights(model), opt.traffic()["statistics"]

    narrow, wide = (run_threads(2, work, wire=w, owners=owners) for w in (wire, None))
    assert torch.equal(narrow[0][0], narrow[1][0])
    assert 0.5 * wide[0][1] < narrow[0][1] < 0.7 * wide[0][1]  # the rest is one size a sample
    assert_close(narrow[0][0], wide[0][0], rtol=0.05, atol=0.01)
    assert not torch.equal(narrow[0][0], wide[0][0])


def test_a_network_in_use_learns():
    model = Net()
    opt = natgrad.SENG(model, lr=0.3, damping=0.3, refresh=5)
    x, y = Net.batch(64, 0)
    losses = train(opt, model, [(x.float(), y)] * 40)
    assert losses[-1] < 0.5 * losses[0]
