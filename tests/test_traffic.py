"""What travels between ranks in a step, by kind, in bytes."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import natgrad
from helpers import Mixed, backward, clone, quiet, train, weights
from multi import share
from natgrad.capture import Measured
from natgrad.curvature_engine import SeenByRanks
from natgrad.parallel import OwnedTensor, World, run_threads
from natgrad.parallel.transport import Alone
from natgrad_lab.models.imagenet import ImageResNet


def counts(model, ranks=2, steps=1, kind=natgrad.SPNGD, **options):
    """Bytes by kind of each of `steps` steps on rank 0, and the optimizer's cells."""

    def work(world):
        torch.manual_seed(0)
        mine = model()
        opt = quiet(kind, mine, lr=0.01, world=world, **options)
        result = []
        for k in range(steps):
            backward(mine, share(Mixed.batch(16, k), world))
            opt.step()
            opt.zero_grad()
            result.append(opt.traffic())
        return result, opt.cells

    return run_threads(ranks, work)[0]


def test_traffic_is_triangles_gradients_and_weights():
    [first], cells = counts(Mixed)
    statistics = 0
    for cell in cells:
        for moment in cell.curvature.statistics:
            shape = moment.shape(cell.layer)
            square = len(shape) == 3
            statistics += shape[0] * (shape[1] * (shape[1] + 1) // 2 if square else shape[1])
    parameters = sum(p.numel() for p in Mixed().parameters())
    assert first["statistics"] == 4 * statistics
    assert first["gradients"] == first["weights"] == 4 * parameters


def test_nothing_stale_sends_no_statistics():
    (first, second, third), _ = counts(Mixed, steps=3, refresh=2)
    assert first["statistics"] == third["statistics"] > 0
    assert "statistics" not in second
    assert second["gradients"] == first["gradients"]
    layers = 6
    each = 2 + 3 * layers + 8  # finite? told? gradients, half frozen, lost; the step's length
    assert second["scalars"] <= 8 * each


def test_directions_travel_instead_of_weights():
    [step], _ = counts(Mixed, kind=natgrad.KFAC, gather="directions")
    assert step["directions"] == step["gradients"]
    assert "weights" not in step


def test_one_rank_sends_nothing():
    [only], _ = counts(Mixed, ranks=1)
    assert not any(only.values())


class Silent(Alone):
    """Several ranks of which only this one is there; nothing is really sent."""

    size = 107

    def reduce_scatter(self, chunks):
        return lambda: chunks[0]

    def all_gather(self, chunk, lengths):
        return [chunk.new_empty(n) for n in lengths]


@pytest.mark.parametrize("wire", [None, torch.bfloat16], ids=str)
def test_an_all_fresh_step_of_a_resnet50_sends_the_papers_bytes(wire):
    """Spec section 7: 615.8 MB as full squares in single precision, 308.2 MB as triangles; half of it in bf16."""
    with torch.device("meta"):
        model = ImageResNet(depth=50).build((3, 224, 224), 1000)
    world = World(Silent(), wire=wire, weights=wire)
    opt = natgrad.SPNGD(model, lr=0.1, rows_per_dim=None, refresh=1, world=world)
    world.sent.clear()
    keys = [(k, m.key) for k, cell in enumerate(opt.cells) for m in cell.curvature.statistics]
    nothing = Measured({}, {}, {}, 1, {}, 1.0, None, 0.0, {})
    weights = dict.fromkeys(keys, 1.0)
    parcels = opt.engine._parcels(keys, nothing, SeenByRanks(1, 1, "", None, weights, {}, {}), 1.0, "mean", 107, 1.0)
    world.reduce_narrow(parcels, "statistics")
    narrower = 1 if wire is None else 2
    assert world.sent["statistics"] / 1e6 == pytest.approx(308.2 / narrower, abs=0.1)
    assert sum(4 * p.tensor.numel() for p in parcels) / 1e6 == pytest.approx(615.8, abs=0.1)
    assert len(opt.cells) == 107
    weights = [OwnedTensor(p.detach(), c.owner) for c in opt.cells for p in c.layer.parameters]
    world.gather_narrow(weights, "weights")
    assert world.sent["weights"] == 4 * 25_557_032 / narrower


WIRES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_half_precision_halves_the_bytes_of_statistics(wire):
    start = Mixed()

    def work(world):
        model = clone(start)
        opt = natgrad.SPNGD(model, lr=0.02, damping=0.03, rows_per_dim=None, refresh=1, world=world)
        traffic = []
        for k in range(4):
            backward(model, share(Mixed.batch(16, k), world))
            opt.step()
            opt.zero_grad()
            traffic.append(opt.traffic())
        return weights(model), traffic[-1], opt.engine.dropped

    narrow, wide = run_threads(2, work, wire=wire), run_threads(2, work)
    assert narrow[0][1]["statistics"] * 2 == wide[0][1]["statistics"]
    assert narrow[0][1]["gradients"] == wide[0][1]["gradients"]
    assert narrow[0][2] == 0
    assert torch.equal(narrow[0][0], narrow[1][0])
    assert_close(narrow[0][0], wide[0][0], rtol=0.05, atol=0.01)
    assert not torch.equal(narrow[0][0], wide[0][0])


@pytest.mark.parametrize("wire", WIRES, ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-3, 1e6, 1e20])
def test_a_narrow_sum_survives_every_scale(wire, size):
    """All-zero statistics (a dead layer) and those far outside of float16's range."""

    def work(world):
        tensor = torch.full((1, 3, 3), size * (1 + world.rank))
        return world.reduce_narrow([OwnedTensor(tensor, 1, True)])[0]

    result = run_threads(3, work, wire=wire)
    assert result[0] is None
    assert result[2] is None
    assert_close(result[1], torch.full((1, 3, 3), 6 * size), rtol=0.02, atol=0.0)


def test_a_dead_layer_on_a_narrow_wire():
    """Zero outputs' gradients: G is zero, nothing is dropped and training goes on."""

    def work(world):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 6)), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
        model[2].bias.data.fill_(-100)
        opt = natgrad.SPNGD(model, lr=0.02, rows_per_dim=None, world=world)
        batch = share(Mixed.batch(16, 0), world)
        train(opt, model, [(batch[0].float(), batch[1])] * 2)
        return weights(model), opt.engine.dropped

    for final, dropped in run_threads(2, work, wire=torch.float16):
        assert bool(torch.isfinite(final).all())
        assert dropped == 0


def test_weights_that_nobody_sends_have_no_type_of_their_own():
    with pytest.raises(ValueError, match="leave weights out"):
        World(weights=torch.bfloat16, owners=False)


def test_an_unknown_wire_is_refused():
    with pytest.raises(ValueError, match=r"wire=torch.int8.*torch.bfloat16"):
        World(wire=torch.int8)


@pytest.mark.parametrize("narrow", WIRES, ids=str)
def test_half_precision_weights_have_masters_at_their_owners(narrow):
    """All ranks see rounded weights; small steps add up all the same."""
    start = Mixed()

    def work(world, lr=1e-5):
        model = clone(start)
        opt = natgrad.SPNGD(model, lr=lr, damping=0.03, rows_per_dim=None, world=world)
        for k in range(30):
            backward(model, share(Mixed.batch(16, k % 2), world))
            opt.step()
            opt.zero_grad()
        return weights(model), opt.traffic(), opt

    rounded, exact = run_threads(2, work, weights=narrow), run_threads(2, work)
    assert torch.equal(rounded[0][0], rounded[1][0])
    assert torch.equal(rounded[0][0], rounded[0][0].to(narrow).float())
    assert rounded[0][1]["weights"] * 2 == exact[0][1]["weights"]
    assert rounded[0][1]["gradients"] == exact[0][1]["gradients"]
    masters = 0
    for (_, _, opt), (_, _, other) in zip(rounded, exact):
        both = zip(opt.param_groups[0]["params"], other.param_groups[0]["params"], start.parameters())
        for rough, fine, first in both:
            kept = opt.state[rough].get("master")
            if kept is not None:
                masters += 1
                assert torch.equal(kept.to(narrow).float(), rough)
                assert (kept - fine).norm() < 0.2 * (fine - first).norm()  # of steps that rounding would swallow
    assert masters == len(list(start.parameters()))  # each at one rank


def test_directions_may_be_half_precision_too():
    start = Mixed()

    def work(world):
        model = clone(start)
        opt = natgrad.KFAC(model, lr=0.01, rows_per_dim=None, gather="directions", world=world)
        for k in range(3):
            backward(model, share(Mixed.batch(16, k), world))
            opt.step()
            opt.zero_grad()
        return weights(model), opt.traffic()

    narrow, wide = run_threads(3, work, weights=torch.bfloat16), run_threads(3, work)
    assert narrow[0][1]["directions"] * 2 == wide[0][1]["directions"]
    assert all(torch.equal(final, narrow[0][0]) for final, _ in narrow)
    assert_close(narrow[0][0], wide[0][0], rtol=0.02, atol=0.005)


def test_a_state_without_masters_is_taken():
    """Saved where weights travel as they are, loaded where they travel rounded."""
    start = Mixed()

    def work(world):
        model = clone(start)
        opt = natgrad.SPNGD(model, lr=0.01, rows_per_dim=None, world=world)
        backward(model, share(Mixed.batch(16, 0), world))
        opt.step()
        return model, opt.gather_state_dict()

    model, saved = run_threads(2, work)[0]

    def resume(world):
        mine = clone(model)
        opt = natgrad.SPNGD(mine, lr=0.01, rows_per_dim=None, world=world)
        opt.load_state_dict(saved)
        backward(mine, share(Mixed.batch(16, 1), world))
        opt.step()
        return weights(mine)

    assert_close(run_threads(2, resume, weights=torch.bfloat16)[0], run_threads(2, resume)[0], rtol=0.01, atol=1e-3)
