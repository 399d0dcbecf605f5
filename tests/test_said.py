"""What natgrad says, and where: the user's line, the class that was called, the argument that was given, once."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import natgrad
from helpers import OPTIMIZERS, Mixed, backward, heard, made, mlp, points, quiet, said_by, train
from natgrad.parallel import World

every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)


class UncurvedParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain, self.head = nn.Parameter(torch.ones(30)), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x) * self.gain.sum() / 30


@every_optimizer
def test_unknown_arguments_are_those_of_the_class_that_was_called(kind):
    with pytest.raises(TypeError, match=rf"^{kind.__name__}\(\) has no argument 'betas': momentum= is the first"):
        kind(mlp(), lr=0.1, betas=(0.9, 0.999))
    with pytest.raises(
        TypeError, match=rf"^{kind.__name__}\(\) has no argument 'weight_decays': did you mean weight_decay="
    ):
        kind(mlp(), lr=0.1, weight_decays=0.1)


@every_optimizer
def test_signatures_are_complete_and_names_of_the_version_before_warn(kind):
    known = inspect.signature(kind).parameters
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    assert {"params", "reduction", "predictions", "max_norm", "scaler", "seed", "world", "graph"} <= set(known)
    for old, new, value in (("samples", "rows_per_dim", None), ("decay", "ema_decay", 0.25)):
        if new in known:
            blocks = {"preconditioner": natgrad.spngd_blocks} if kind is natgrad.NLCG else {}
            with pytest.warns(DeprecationWarning, match=f"^{old}= is now {new}=$"):
                opt = kind(mlp(), 0.1, **{old: value}, **blocks)
            assert getattr(opt, new) == value
            with pytest.raises(TypeError, match=f"{old}= is the old name of {new}="):
                kind(mlp(), 0.1, **{old: value, new: value}, **blocks)
    opt = kind(mlp(), 0.1)
    with pytest.warns(DeprecationWarning, match=r"reduce\(\) is now average_gradients\(\)"):
        opt.reduce()


def test_subclasses_of_users_have_arguments_of_their_own():
    class Mine(natgrad.SPNGD):
        def __init__(self, model, lr, *, extra=1, **shared):
            self.extra = extra
            super().__init__(model, lr, **shared)

    assert Mine(mlp(), 0.1, extra=2, damping=0.1).extra == 2
    with pytest.raises(TypeError, match=r"^Mine\(\) has no argument 'extras'"):
        Mine(mlp(), 0.1, extras=2)


@every_optimizer
def test_a_learning_rate_that_is_a_tensor_is_refused_with_the_way_out(kind):
    with pytest.raises(ValueError, match=r"lr=tensor.*give a float, as lr.item\(\)"):
        kind(mlp(), lr=torch.tensor(0.1))
    opt = made(kind, mlp(), lr=0.1)
    opt.param_groups[0]["lr"] = torch.tensor(0.1)
    with pytest.raises(ValueError, match="lr=tensor"):
        opt.step()


def test_numbers_of_numpy_are_numbers():
    import numpy

    assert natgrad.SPNGD(mlp(), lr=numpy.float32(0.1)).param_groups[0]["lr"] == numpy.float32(0.1)


def test_warnings_name_the_line_of_the_user():
    model = UncurvedParameter()
    with heard() as said:
        line = inspect.currentframe().f_lineno + 1
        natgrad.SPNGD(model, lr=0.1)
    assert [(w.filename, w.lineno) for w in said] == [(__file__, line)]
    model = Mixed()
    opt = natgrad.SPNGD(model, lr=0.1)
    backward(model, Mixed.batch(8, 0))
    model.add_module("late", nn.Linear(2, 2))
    with heard() as said:
        line = inspect.currentframe().f_lineno + 1
        opt.step()
    assert {(w.filename, w.lineno) for w in said} == {(__file__, line)}


def test_more_than_half_without_curvature_is_said_with_the_reasons():
    (text,) = said_by(lambda: natgrad.SPNGD(UncurvedParameter(), lr=0.1))
    assert text.startswith("67% of the weights have no curvature: no layer is registered for UncurvedParameter (67%)")
    assert not said_by(lambda: natgrad.SPNGD(Mixed(), lr=0.1))
    assert not said_by(lambda: natgrad.NLCG(UncurvedParameter(), lr=0.1))  # its metric takes all


@every_optimizer
def test_coverage_prints_as_a_table_and_is_counted(kind):
    model = Mixed()
    opt = made(kind, model, lr=0.01)
    lines = str(opt.coverage()).splitlines()
    assert len(lines) == len(opt.coverage()) + 2
    assert lines[0].split() == ["layer", "curvature", "weights", "bytes", "owner", "why"]
    assert lines[-1].endswith("% of the weights have a curvature of their own")
    assert [row.layer for row in opt.coverage()] == [line.split()[0] for line in lines[1:-1]]
    assert opt.preconditioned.layers == 0
    train(opt, model, [Mixed.batch(12, 0)])
    found, rows = opt.preconditioned, opt.coverage()
    assert (found.layers, found.of_layers) == (sum(r.covered for r in rows), len(rows))
    assert found.weights == sum(r.parameters for r in rows if r.covered)
    assert found.share == pytest.approx(rows.share)


def test_a_layer_whose_statistics_cannot_be_used_says_so_and_then_trains_by_the_fallback():
    """Infinite inputs of one layer that no gradient sees."""

    class Overflowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.side = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.body(x) + self.side(x * 1e20)  # squares of its inputs are infinite in single precision

    torch.manual_seed(0)
    model = Overflowing()
    nn.init.constant_(model.side.weight, 1e-20)
    opt = natgrad.SPNGD(model, lr=1e-3, refresh=1)
    said = []
    for k in range(7):
        x, y = points(12, k)
        opt.zero_grad()
        (1e-15 * F.cross_entropy(model(x), y)).backward()
        said.append(said_by(opt.step))
    told = [(k, text) for k, texts in enumerate(said) for text in texts if text.startswith("side")]
    assert [k for k, _ in told] == [1, 4]
    assert told[0][1].startswith("side: its statistics are not finite")
    assert "5 times in a row; so without curvature (adam)" in told[1][1]
    assert [row.layer for row in opt.coverage() if not row.covered] == ["side.weight", "side.bias"]


def test_a_statistic_that_is_lost_once_is_not_a_warning():
    model = mlp()
    opt = natgrad.SPNGD(model, lr=1e-3, refresh=1)
    train(opt, model, [points(12, 0)])
    x, _ = points(12, 1)
    hook = model[2].register_forward_pre_hook(lambda m, a: (a[0] * 1e25,))
    (model(x) * 1e-27).sum().backward()
    hook.remove()
    assert not said_by(opt.step)
    opt.zero_grad()
    train(opt, model, [points(12, 2)])
    assert opt.engine.dropped > 0
    assert opt.engine.drops == {}


def test_a_part_of_a_state_is_said_once():
    from multi import run

    told = []

    def look(opt):
        told.append(said_by(opt.state_dict))

    run(2, mlp(), [points(12, 0), points(12, 1)], lambda m, w: natgrad.SPNGD(m, lr=0.1, world=w), before=look)
    assert sum(bool(h) for h in told) >= 1
    assert all("gather_state_dict()" in text for h in told for text in h)
    assert not said_by(natgrad.SPNGD(mlp(), lr=0.1).state_dict)


def test_a_launcher_without_a_process_group_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2") as found:
        natgrad.SPNGD(mlp(), lr=0.1)
    lines = str(found.value).splitlines()
    assert "init_process_group" in lines[1]
    assert "natgrad.SPNGD(model" in lines[2]
    assert natgrad.SPNGD(mlp(), lr=0.1, world=World.alone()).world.size == 1
    monkeypatch.setenv("WORLD_SIZE", "1")
    natgrad.SPNGD(mlp(), lr=0.1)


def test_what_was_assumed_is_readable_after_the_first_measurement():
    model = Mixed()
    opt = natgrad.SPNGD(model, lr=0.01)
    assert opt.assumed is None
    train(opt, model, [Mixed.batch(12, 0)])
    assert (opt.assumed.samples, opt.assumed.predictions) == (12, 1)
    assert "12 samples" in str(opt.assumed)
    assert "rows of the output of head" in str(opt.assumed)
    told = natgrad.SPNGD(mlp(), lr=0.01, reduction="sum")
    model = told._model
    backward(model, points(8, 0), reduction="sum")
    quiet(told.step)
    assert 'reduction="sum"' in str(told.assumed)


def test_names_of_the_version_before_are_found_with_a_warning():
    for module, names in natgrad.MOVED.items():
        for name in names:
            with pytest.warns(DeprecationWarning, match=rf"^natgrad.{name} is now {module.__name__}.{name}$"):
                assert getattr(natgrad, name) is getattr(module, name)
    with pytest.warns(DeprecationWarning, match=r"^natgrad.predicted_change is now natgrad.optim.kl_clip$"):
        assert natgrad.predicted_change is natgrad.optim.kl_clip
    with pytest.raises(AttributeError, match="no attribute 'Diagonal'"):
        _ = natgrad.Diagonal
    assert len(natgrad.__all__) < 26
