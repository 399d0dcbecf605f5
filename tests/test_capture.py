"""Models as they come: whatever they do with their layers, statistics are right or the layer says why it has none."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import natgrad
from helpers import Two, backward, clone, forget, points, row, statistic, train, weights


def spngd(model, **options):
    return natgrad.SPNGD(model, **{"lr": 0.05, "rows_per_dim": None, "refresh": 1, **options})


def reference(batches, model=None):
    """The weights that plain calls of Two lead to."""
    model = Two() if model is None else model
    train(spngd(model), model, batches)
    return weights(model)


def same_as_plain(kind, steps=4, wrap=lambda model: model):
    """A model that computes what Two computes takes the same steps."""
    batches = [points(12, k) for k in range(steps)]
    torch.manual_seed(5)
    plain = Two()
    other = kind()
    other.load_state_dict(plain.state_dict())
    expected = reference(batches, plain)
    opt = spngd(other)
    train(opt, wrap(other), batches)
    assert_close(weights(other), expected, rtol=1e-5, atol=1e-6)
    return opt


def test_calls_by_keyword():
    class Keyword(Two):
        def forward(self, x):
            return self.head(input=torch.tanh(self.body(input=x)))

    same_as_plain(Keyword)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    """Forward hooks fire twice, and reentrant checkpoints run a backward pass within the backward pass."""

    class Checkpointed(Two):
        def forward(self, x):
            x = x.clone().requires_grad_()
            return self.head(checkpoint(lambda h: torch.tanh(self.body(h)), x, use_reentrant=reentrant))

    same_as_plain(Checkpointed)


def test_an_in_place_activation_behind_a_layer():
    class InPlace(Two):
        def forward(self, x):
            return self.head(self.body(x).tanh_())

    same_as_plain(InPlace)


def test_a_compiled_model_measures_the_same():
    """Measuring steps run eagerly; the others run compiled."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    same_as_plain(Two, wrap=lambda model: torch.compile(model, backend=backend))
    assert not graphs
    forget()
    model = Two()
    plain = clone(model)
    compiled = torch.compile(model, backend=backend)
    opt, other = (natgrad.SPNGD(m, lr=0.05, rows_per_dim=None, refresh=3) for m in (compiled, plain))
    train(other, plain, [points(12, k) for k in range(3)])  # two steps measure nothing
    del other
    forget()
    train(opt, compiled, [points(12, k) for k in range(3)])
    assert graphs
    assert_close(weights(model), weights(plain))
    assert statistic(opt, "body", "A_clock").tolist() == [4, 3, 1, 1]
    torch._dynamo.reset()


def test_layers_in_eval_mode():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    opt = spngd(model)
    train(opt, model, [points(12, k) for k in range(3)])
    assert all(c.ready for c in opt.cells)


class Optional(Two):
    def __init__(self):
        super().__init__()
        self.extra, self.use = nn.Linear(4, 4), False

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.head(torch.tanh(self.extra(h)) if self.use else h)


@pytest.mark.filterwarnings("error::natgrad.NatgradWarning")
def test_a_layer_that_comes_into_use_later():
    model = Optional()
    opt = spngd(model)
    kept = model.extra.weight.detach().clone()
    train(opt, model, [points(12, k) for k in range(3)])
    assert torch.equal(model.extra.weight, kept)
    model.use = True
    train(opt, model, [points(12, k) for k in range(3)])
    assert not torch.equal(model.extra.weight, kept)
    assert row(opt, "extra").curvature == "kronecker"
    model.use = False
    kept = model.extra.weight.detach().clone()
    train(opt, model, [points(12, k) for k in range(3)])
    assert torch.equal(model.extra.weight, kept)


def test_a_layer_called_twice_in_a_pass(double):
    """A is the mean over calls, G the sum."""

    class Twice(Two):
        def forward(self, x):
            self.inputs = [x, x.flip(1)]
            self.outputs = [self.body(h) for h in self.inputs]
            for out in self.outputs:
                out.retain_grad()
            return self.head(sum(torch.tanh(out) for out in self.outputs))

    model = Twice()
    opt = spngd(model)
    backward(model, points(6, 0, torch.float64))
    opt.step()
    rows = torch.cat([torch.cat(model.inputs), torch.ones(12, 1)], 1)
    outputs = torch.cat([out.grad for out in model.outputs]) * 6
    assert_close(statistic(opt, "body", "A")[0], rows.T @ rows / 12)
    assert_close(statistic(opt, "body", "G")[0], outputs.T @ outputs / 6)


def test_unit_gradients_of_two_calls_add_up_before_they_square(double):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.norm(x)) + torch.tanh(self.norm(x.flip(1))))

    model = Normed()
    opt = spngd(model, lr=1e-9)
    x, y = points(6, 0, torch.float64)
    units = []
    for k in range(6):
        loss = F.cross_entropy(model(x[k : k + 1]), y[k : k + 1])
        units.append(torch.stack(torch.autograd.grad(loss, list(model.norm.parameters())), -1))
    opt.zero_grad()
    backward(model, (x, y))
    opt.step()
    u = torch.stack(units)
    assert_close(statistic(opt, "norm", "F"), torch.einsum("nci,ncj->cij", u, u) / 6)
