"""Steps whose launches are made again, on the host in the place of CUDA graphs, end where plain ones do."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import natgrad
from helpers import Mixed, backward, points, weights
from launches import HostRecorder
from natgrad.curvature.sample_space import SampleSpace
from natgrad.optim.graphs import PATIENCE, Graphs
from natgrad.optim.seng import SampleBlocks
from natgrad.parallel import run_threads

RULES = {"after": natgrad.Momentum(), "before": natgrad.Momentum(before=True)}
LENGTHS = {
    "measured": natgrad.MeasuredChange(0.05),
    "predicted": natgrad.KLClip(0.01),
    "plain": natgrad.plain,
    "trust": natgrad.trust,
}


def recorded(opt):
    """The optimizer with graphs of the host."""
    opt.refuse_graphs()
    opt.graphs = Graphs(HostRecorder(), opt.readings, opt.world)
    opt.settle()
    opt._store()
    return opt


def walk(opt, model, batches, rate=lambda k: 0.1):
    for k, batch in enumerate(batches):
        for group in opt.param_groups:
            group["lr"] = rate(k)
        backward(model, batch)
        opt.step()
        opt.zero_grad()


def pair(model, build):
    other = copy.deepcopy(model)
    return (model, build(model)), (other, recorded(build(other)))


def falling(k):
    return 0.2 / (1 + k / 3)


@pytest.mark.parametrize("kind", [natgrad.SPNGD, natgrad.KFAC], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
def test_a_recorded_step_is_the_step(kind, rule, length, double):
    """With a schedule, weight decay, parameters without curvature, and measurements in between."""
    build = lambda m: kind(m, lr=0.1, rule=rule, length=length, weight_decay=0.01, refresh=4, rows_per_dim=None)  # noqa: E731
    batches = [Mixed.batch(12, k) for k in range(12)]
    (plain_model, plain), (model, opt) = pair(Mixed(), build)
    walk(plain, plain_model, batches, falling)
    walk(opt, model, batches, falling)
    assert_close(weights(model), weights(plain_model), rtol=1e-12, atol=1e-13)
    assert opt.last_step == pytest.approx(plain.last_step, rel=1e-9) if plain.last_step else opt.last_step is None
    assert opt.graphs.launched >= 8
    assert opt.graphs.recorded >= 1
    for one, other in zip(opt.state_dict()["state"].values(), plain.state_dict()["state"].values()):
        for key in one:
            assert_close(one[key], other[key], rtol=1e-9, atol=1e-12)


def test_groups_with_rates_of_their_own(double):
    def build(m):
        named = dict(m.named_parameters())
        groups = [
            {"params": [p for n, p in named.items() if "bias" in n], "weight_decay": 0.0},
            {"params": [p for n, p in named.items() if "bias" not in n], "lr": 0.03, "weight_decay": 0.1},
        ]
        return natgrad.SPNGD(m, lr=0.1, params=groups, rows_per_dim=None, max_norm=0.5)

    (plain_model, plain), (model, opt) = pair(Mixed(), build)
    for k in range(9):
        for o, m in ((plain, plain_model), (opt, model)):
            for place, group in enumerate(o.param_groups):
                group["lr"] = falling(k) / (1 + place)
            backward(m, Mixed.batch(12, k))
            o.step()
            o.zero_grad()
    assert_close(weights(model), weights(plain_model), rtol=1e-12, atol=1e-13)
    assert opt.graphs.launched >= 6


class Forked(nn.Module):
    """Uses one of two branches."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.branches = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.used = 0

    def forward(self, x):
        return self.last(torch.tanh(self.branches[self.used](torch.tanh(self.first(x)))))


def test_each_set_of_layers_has_a_program(double):
    (plain_model, plain), (model, opt) = pair(
        Forked(), lambda m: natgrad.SPNGD(m, lr=0.1, rows_per_dim=None, refresh=50)
    )
    for k in range(16):
        for o, m in ((plain, plain_model), (opt, model)):
            m.used = k % 2
            backward(m, points(12, k, torch.float64))
            o.step()
            o.zero_grad()
    assert_close(weights(model), weights(plain_model), rtol=1e-12, atol=1e-13)
    assert opt.graphs.recorded == 2
    assert opt.graphs.launched >= 8


@pytest.mark.parametrize("change", ["momentum", "weight_decay", "moved weights", "loaded state"])
def test_what_is_constant_may_change(change, double):
    build = lambda m: natgrad.SPNGD(m, lr=0.1, rows_per_dim=None, weight_decay=0.01)  # noqa: E731
    (plain_model, plain), (model, opt) = pair(Mixed(), build)
    batches = [Mixed.batch(12, k) for k in range(12)]
    for o, m in ((plain, plain_model), (opt, model)):
        walk(o, m, batches[:6])
        if change in ("momentum", "weight_decay"):
            o.param_groups[0][change] = 0.3
        elif change == "moved weights":
            for p in m.parameters():
                p.data = p.data.clone()
        else:
            o.load_state_dict(copy.deepcopy(o.state_dict()))
        walk(o, m, batches[6:])
    assert_close(weights(model), weights(plain_model), rtol=1e-12, atol=1e-13)
    assert opt.graphs.launched >= 6


def test_a_step_that_is_skipped_changes_nothing(double):
    (plain_model, plain), (model, opt) = pair(Mixed(), lambda m: natgrad.SPNGD(m, lr=0.1, rows_per_dim=None))
    for o, m in ((plain, plain_model), (opt, model)):
        for k in range(8):
            backward(m, Mixed.batch(12, k))
            if k == 5:
                next(m.parameters()).grad[0] = float("inf")
            o.step()
            o.zero_grad()
        assert o.skipped == 1
    assert_close(weights(model), weights(plain_model), rtol=1e-12, atol=1e-13)


def ranked(world, start, graphs):
    model = copy.deepcopy(start)
    opt = natgrad.SPNGD(model, lr=0.1, rows_per_dim=None, refresh=4, world=world)
    if graphs:
        recorded(opt)
    walk(opt, model, [Mixed.batch(12, 10 * world.rank + k) for k in range(10)], falling)
    return weights(model), opt.last_step, opt.graphs and opt.graphs.launched, opt.traffic()


def test_messages_cut_a_recorded_step(double):
    start = Mixed()
    plain, graphs = (run_threads(2, lambda world, use=use: ranked(world, start, use)) for use in (False, True))
    for (w, told, _, sent), (other, again, launched, traffic) in zip(plain, graphs):
        assert_close(other, w, rtol=1e-12, atol=1e-13)
        assert again == pytest.approx(told, rel=1e-9)
        assert launched >= 6
        assert traffic == sent


def test_steps_that_cannot_be_launched_are_said():
    model = Mixed()
    opt = recorded(natgrad.SPNGD(model, lr=0.1, refresh=50))

    def restless():
        for k in range(PATIENCE + 2):
            opt.param_groups[0]["momentum"] = 0.5 + k / 100
            walk(opt, model, [Mixed.batch(12, k)])

    with pytest.warns(natgrad.NatgradWarning, match="graph=True: none of the last"):
        restless()
    assert opt.graphs.launched == 0
    assert len(opt.graphs.programs) <= 4


def test_a_read_in_a_recorded_step_is_refused():
    with pytest.raises(RuntimeError, match="while launches are recorded"), HostRecorder().record():
        float(torch.ones(3).sum())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"rescale": "always"}, "rescale"),
        ({"length": lambda segments, world: [1.0] * len(segments)}, "of your own"),
        ({"curvature": SampleBlocks(SampleSpace())}, "space of samples"),
    ],
    ids=["rescale", "length", "samples"],
)
def test_what_cannot_be_recorded_is_refused(options, why):
    with pytest.raises(ValueError, match=f"graph=True cannot record a step with .*{why}"):
        natgrad.SPNGD(Mixed(), lr=0.1, **options).refuse_graphs()


def test_graphs_need_a_gpu():
    with pytest.raises(ValueError, match="graph=True: the parameters are on cpu, and CUDA graphs need a GPU"):
        natgrad.SPNGD(Mixed(), lr=0.1, graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        natgrad.KFAC(Mixed(), lr=0.1, graph=False)


def test_parameters_that_join_are_looked_at_too():
    """A recorded step would take their learning rate for a constant."""
    model = Forked()
    model.branches[1].requires_grad_(False)
    opt = recorded(natgrad.SPNGD(model, lr=0.1))
    model.branches[1].to(torch.bfloat16).requires_grad_(True)
    with pytest.raises(ValueError, match="graph=True cannot record a step with parameters in half precision"):
        opt.add_param_group({"params": list(model.branches[1].parameters())})
