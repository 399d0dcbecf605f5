"""Symmetric matrices in half of their squares: exact, multiplied by as they are, and nothing else changes."""

import json
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import golden
import natgrad
from helpers import Net, backward, clone, statistic, train, weights
from natgrad import layer_state, triangles
from natgrad.curvature import Kronecker
from natgrad.optim import LayerBlocks
from natgrad.optim.fallback import Adam
from natgrad.parallel import run_threads
from natgrad.triangles import SymmetricSlabs, halves, slabs

SIDES = (4, 5, 7, 8, 13, 31, 64, 100, 129)
KEPT = json.loads(golden.FILE.read_text())


@pytest.fixture
def small(monkeypatch):
    """Matrices of any size are packed, and multiplied by as slabs."""
    for name, value in {"LEAST": 3, "BLOCK": 1, "SLABBED": 4, "ROWS": 2}.items():
        monkeypatch.setattr(triangles, name, value)


def symmetric(b, n):
    half = torch.randn(b, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    return half + half.mT


@pytest.mark.parametrize("n", SIDES)
@pytest.mark.parametrize("form_of", [halves, slabs], ids=lambda f: f.__name__)
def test_a_packed_matrix_is_the_matrix(small, form_of, n):
    form, matrix = form_of(n), symmetric(3, n)
    for square in (matrix, matrix.mT, torch.stack([matrix, -matrix], 3)[..., 0]):
        assert torch.equal(form.unpack(form.pack(square)), matrix)
    base = torch.zeros(5, form.numel, dtype=torch.float64)
    base[1:4] = form.pack(matrix)
    assert torch.equal(form.unpack(base[1:4]), matrix)
    assert n * (n + 1) // 2 <= form.numel < n * n
    assert_close(form.mean_eigenvalue(base[1:4]), matrix.diagonal(dim1=1, dim2=2).mean(1))


def test_only_the_lower_triangle_is_read(small):
    matrix = symmetric(2, 13)
    for form in (halves(13), slabs(13)):
        above = torch.zeros(2, 13, 13, dtype=torch.float64)
        places = form.unpack(form.pack(above + 1).mul_(0)) == 0  # all
        assert bool(places.all())
        spoilt = matrix.clone()
        spoilt[:, 0, 12] = math.nan  # far from the diagonal's blocks
        assert torch.equal(form.unpack(form.pack(spoilt)), matrix)


@pytest.mark.parametrize("n", SIDES)
def test_the_norm_of_a_packed_matrix_is_that_of_its_square(small, n):
    form, matrix = halves(n), symmetric(2, n)
    twice, once = form.by_weight(form.pack(matrix))
    assert_close(2 * twice.square().sum() + once.square().sum(), matrix.square().sum())


@pytest.mark.parametrize("n", SIDES)
def test_products_with_slabs_are_those_with_squares(small, n):
    form, matrix = slabs(n), symmetric(3, n)
    x = torch.randn(3, n, 6, dtype=torch.float64)
    packed = SymmetricSlabs(form, form.pack(matrix))
    assert (packed.shape, packed.dim(), len(packed)) == (matrix.shape, 3, 3)
    assert_close(packed @ x, matrix @ x)
    assert_close(x.mT @ packed, x.mT @ matrix)
    assert_close(packed @ x[..., :1], matrix @ x[..., :1])


def test_large_matrices_take_little_more_than_half():
    for n, kept, multiplied in ((768, 0.52, 0.63), (1000, 0.52, 0.61), (3073, 0.505, 0.563), (4608, 0.505, 0.563)):
        assert halves(n).numel / n**2 < kept
        assert slabs(n).numel / n**2 < multiplied
    assert halves(100) is None
    assert slabs(512) is None


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "case",
    ["spngd", "spngd, measured change", "spngd, running means, all rows", "spngd, eigenvectors, full norms", "kfac"],
)
def test_packed_or_not_twenty_steps_end_where_they_ended(small, case, ranks):
    assert golden.difference(golden.made(case, ranks), KEPT[f"{case}, {ranks}"]) < 1e-9


def test_layers_over_ranks_send_and_keep_inverses_as_ever(small, monkeypatch):
    monkeypatch.setattr("natgrad.parallel.placement.WORTH", 0)
    torch.manual_seed(1)
    start = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.LayerNorm(20), nn.Linear(20, 3)).double()

    def work(world):
        model = clone(start)
        opt = natgrad.SPNGD(model, 0.05, rows_per_dim=None, refresh=2, world=world)
        for k in range(4):
            x = torch.randn(12, 30, generator=torch.Generator().manual_seed(k)).double()
            y = torch.arange(12) % 3
            backward(model, (x.chunk(world.size)[world.rank], y.chunk(world.size)[world.rank]))
            opt.step()
            opt.zero_grad()
        return weights(model), [cell.split for cell in opt.cells], opt.traffic()

    (alone, *_), (both, split, _) = run_threads(1, work)[0], run_threads(2, work)[0]
    assert any(split)
    assert_close(both, alone, rtol=1e-9, atol=1e-12)


def decided(refresh, steps=60):
    """The intervals after every step of a run in single precision, and its weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(150, 140), nn.Tanh(), nn.Linear(140, 130), nn.Tanh(), nn.Linear(130, 10))
    opt, found = natgrad.KFAC(model, 0.05, refresh=refresh), []
    for k in range(steps):
        generator = torch.Generator().manual_seed(k)
        y = torch.randint(10, (128,), generator=generator)
        x = torch.randn(128, 150, generator=generator) + 2 * nn.functional.one_hot(y, 150)
        backward(model, (x, y))
        opt.step()
        opt.zero_grad()
        found.append(opt.intervals())
    return opt, found, weights(model)


@pytest.mark.parametrize("tolerance", [0.05, 0.1, 0.2])
def test_half_precision_decides_as_single_precision(monkeypatch, tolerance):
    """The value before the last is only compared with: the same intervals, so the same run to the last bit."""
    refresh = natgrad.Adaptive(tolerance)
    opt, narrow, end = decided(refresh)
    assert statistic(opt, "0", "A_before").dtype == torch.bfloat16
    monkeypatch.setattr(layer_state, "NARROW", {torch.float32: torch.float32})
    opt, wide, other = decided(refresh)
    assert statistic(opt, "0", "A_before").dtype == torch.float32
    assert narrow == wide
    assert torch.equal(end, other)
    told = {interval for intervals in wide for interval in intervals.values()}
    assert len(told) >= 4  # it kept, halved and lengthened


def test_packed_norms_decide_as_squares(monkeypatch):
    _, packed, _ = decided(natgrad.Adaptive(0.05))
    monkeypatch.setattr(triangles, "LEAST", 10**6)
    opt, plain, _ = decided(natgrad.Adaptive(0.05))
    assert opt.cells[0].state()["A"].dim() == 3
    assert packed == plain


def test_what_nothing_reads_is_not_kept():
    for refresh, before in ((natgrad.Every(5), False), (natgrad.Adaptive(), True)):
        opt = natgrad.SPNGD(Net().float(), 0.1, refresh=refresh)
        assert any(key.endswith("_before") for cell in opt.cells for key in cell.state()) == before


@pytest.mark.parametrize("kind", [natgrad.SPNGD, natgrad.KFAC, natgrad.NLCG], ids=lambda kind: kind.__name__)
def test_states_with_squares_load_and_go_on_to_the_last_bit(small, kind):
    """What earlier versions saved, and back."""
    options = {"curvature": natgrad.spngd_blocks} if kind is not natgrad.NLCG else {
        "preconditioner": natgrad.spngd_blocks,
        "step": natgrad.Scheduled(feedback=None),
    }  # fmt: skip
    model = Net().float()
    opt = kind(model, lr=0.05, **options)
    single = [tuple(t.float() if t.is_floating_point() else t for t in Net.batch(16, k)) for k in range(6)]
    train(opt, model, single[:3])
    saved = opt.state_dict()
    whole = opt.distributed_state.squares(saved)
    sides = [v.shape[1:] for s in whole["state"].values() for k, v in s.items() if k in ("A", "A_inverse")]
    assert sides
    assert all(len(side) == 2 and side[0] == side[1] for side in sides)
    assert whole["state"][0]["A"].numel() > saved["state"][0]["A"].numel()
    for state in whole["state"].values():  # as they were before
        state |= {key: value.float() for key, value in state.items() if key.endswith("_before")}
    ends = []
    for state_dict in (saved, whole):
        copy = clone(model)
        new = kind(copy, lr=0.05, **options)
        new.load_state_dict(state_dict)
        train(new, copy, single[3:])
        ends.append(weights(copy))
    assert torch.equal(*ends)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_packed_state_moves_between_worlds(small, ranks):
    """What two ranks gather goes on alone and on three as it would have gone on two."""
    start = Net().double()

    def build(model, world):
        return natgrad.SPNGD(model, 0.05, rows_per_dim=None, damping=0.03, world=world)

    def go_on(world, model, opt, steps):
        for k in steps:
            x, y = Net.batch(24, k)
            backward(model, (x.chunk(world.size)[world.rank], y.chunk(world.size)[world.rank]))
            opt.step()
            opt.zero_grad()

    def first(world):
        model = clone(start)
        opt = build(model, world)
        go_on(world, model, opt, range(4))
        saved, middle = opt.gather_state_dict(), clone(model)
        go_on(world, model, opt, range(4, 8))
        return middle, saved, weights(model), opt.intervals()

    middle, saved, end, intervals = run_threads(2, first)[0]
    (before,) = {v.dtype for s in saved["state"].values() for k, v in s.items() if k == "A_before"}
    assert before == torch.float32  # of a model in double precision

    def second(world):
        model = clone(middle)
        opt = build(model, world)
        opt.load_state_dict(saved)
        go_on(world, model, opt, range(4, 8))
        return weights(model), opt.intervals()

    other, told = run_threads(ranks, second)[0]
    assert_close(other, end, rtol=1e-9, atol=1e-12)
    assert told == intervals


def test_a_square_that_a_trainer_puts_into_the_state_is_taken_over(small):
    model = Net().float()
    opt = natgrad.SPNGD(model, 0.05)
    x, y = Net.batch(16, 0)
    train(opt, model, [(x.float(), y)])
    own = opt.cells[0].state()
    square = opt.cells[0].square("A_inverse")
    own["A_inverse"] = square * 2
    opt.storage.sync(opt.state)
    assert_close(opt.cells[0].square("A_inverse"), square * 2)


class Forgetful:
    """Adam's directions by a fallback that cannot make its last one again."""

    name, allocate, direction = "forgetful", Adam.allocate, Adam.direction
    second, eps, _formed = 0.99, 1e-8, Adam._formed


class Scaled(nn.Module):
    """A layer, and a gain that has no curvature."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 4))
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(torch.tanh(x * self.gain))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_last_direction_of_a_parameter_without_curvature_is_made_again(decay):
    """Kept or made again from Adam's moments, with a momentum and a decay that change, it bounds steps alike."""
    torch.manual_seed(0)
    start, ends, seen = Scaled().double(), [], []
    for fallback in (Forgetful(), Adam()):
        model = clone(start)
        length = natgrad.optim.MeasuredChange(limit=0.01, least=1e-4)
        opt = natgrad.SPNGD(model, 0.5, fallback=fallback, weight_decay=decay, damping=1e-2, length=length)
        assert ("last" in opt.state[model.gain]) == isinstance(fallback, Forgetful)
        loose = []
        for k in range(12):
            generator = torch.Generator().manual_seed(k)
            x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
            opt.param_groups[0].update(momentum=0.5 + 0.03 * k, weight_decay=decay * (1 + k % 3))
            backward(model, (3 * x, x[:, :3].argmax(1)))
            opt.step()
            opt.zero_grad()
            loose.append([opt.last_step.loose, opt.param_groups[0]["shown_loose"]])
        ends.append(weights(model))
        seen.append(loose)
    assert_close(ends[0], ends[1], rtol=1e-11, atol=1e-13)
    assert_close(seen[0], seen[1], rtol=1e-9, atol=0.0)
    assert min(factor for factor, _ in seen[0]) < 1
    assert all(shown for _, shown in seen[0][1:])


def test_a_state_with_the_last_direction_loads_and_looks_back_from_its_next_step_on():
    torch.manual_seed(0)
    model = Scaled()
    old = natgrad.SPNGD(model, 0.5, fallback=Forgetful())
    x = torch.randn(16, 4)
    train(old, model, [(x, x[:, :3].argmax(1))] * 3)
    saved = old.state_dict()
    new = natgrad.SPNGD(clone(model), 0.5)
    new.load_state_dict(saved)
    gain = next(p for p in new.param_groups[0]["params"] if p.shape == (4,))
    assert "last" not in new.state[gain]
    assert new.state[gain]["went"].tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(new.state[gain]["adam_first"], saved["state"][0]["adam_first"])


def test_eigenvectors_are_not_symmetric_and_stay_whole(small):
    curvature = LayerBlocks(natgrad.curvature.EigenKronecker)
    opt = natgrad.SPNGD(Net(), 0.1, curvature=curvature)
    assert opt.cells[0].state()["A"].dim() == 2
    assert opt.cells[0].state()["A_inverse"].shape[1:] == (19, 20)


def test_a_curvature_that_does_more_than_multiply_gets_squares(small):
    class Traced(Kronecker):
        multiplies = False

    opt = natgrad.SPNGD(Net(), 0.1, curvature=LayerBlocks(Traced))
    assert opt.cells[0].state()["A"].dim() == 2
    assert opt.cells[0].state()["A_inverse"].shape[1:] == (19, 19)
