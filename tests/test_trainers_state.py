"""What trainers do with an optimizer: they move the model after it was built, and write the state that rank 0 has."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (  # noqa: TID251  (what trainers call)
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.nn import functional as F
from torch.testing import assert_close

import natgrad
from helpers import (
    OPTIMIZERS,
    Mixed,
    backward,
    clone,
    heard,
    made,
    mlp,
    points,
    quiet,
    said_by,
    train,
    unwarned,
    weights,
)
from natgrad.parallel import run_threads

every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda o: o.__name__)


def averaged_step(model, opt, k, world):
    """A step as DistributedDataParallel and a trainer make it: gradients are means over ranks before `step()`."""
    x, y = (t.chunk(world.size)[world.rank] for t in Mixed.batch(24, k))
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        world.mean([p.grad])
    opt.step()


def run(kind, ranks, start, steps, loaded=None, save="state_dict", **options):
    """The weights, the state and the optimizer of every rank after these steps."""

    def work(world):
        model = clone(start)
        opt = made(kind, model, lr=0.05, damping=0.03, refresh=natgrad.Adaptive(0.5, 24), world=world)
        if loaded is not None:
            opt.load_state_dict(loaded)
        for k in steps:
            averaged_step(model, opt, k, world)
        return model, copy.deepcopy(getattr(opt, save)()), opt

    return run_threads(ranks, work, **options)


@every_optimizer
def test_where_gradients_are_averaged_rank_0_has_the_whole_state(kind, double):
    """Its state_dict() is all that a trainer writes, and the run goes on from it, to the last bit, on all ranks."""
    start = Mixed()
    with unwarned():
        whole = run(kind, 2, start, range(9))
        half = run(kind, 2, start, range(4))
        (model, saved, _), (_, other, _) = half
        rest = run(kind, 2, model, range(4, 9), saved)
    for k, state in saved["state"].items():
        assert state.keys() == other["state"][k].keys()
        assert all(torch.equal(value, other["state"][k][key]) for key, value in state.items())
    for (final, _, _), (resumed, _, _) in zip(whole, rest):
        assert torch.equal(weights(final), weights(resumed))
        assert torch.equal(weights(final), weights(whole[0][0]))
    with unwarned():  # on another number of ranks it means the same
        alone = run(kind, 1, model, range(4, 9), saved)
    assert_close(weights(alone[0][0]), weights(whole[0][0]), rtol=1e-7, atol=1e-9)


@every_optimizer
def test_owners_and_everybody_make_the_same_steps(kind, double):
    """World(owners=True) keeps the layers divided under averaged gradients; what a rank then sends is weights."""
    start = Mixed()
    everybody, divided = (quiet(run, kind, 2, start, range(6), owners=owners) for owners in (None, True))
    assert_close(weights(everybody[0][0]), weights(divided[0][0]), rtol=1e-9, atol=1e-11)
    assert "weights" not in everybody[0][2].traffic()
    assert divided[0][2].traffic()["weights"] > 0
    held = [
        [sum(v.nbytes for s in opt.state.values() for v in s.values()) for *_, opt in ranks]
        for ranks in (everybody, divided)
    ]
    assert held[0][0] == held[0][1]
    assert max(held[1]) < held[0][0] < sum(held[1])  # clocks are everywhere


def test_averaged_gradients_that_were_announced_need_no_first_step():
    def work(world):
        return natgrad.SPNGD(Mixed(), lr=0.1, world=world)

    for opt in run_threads(2, work, gradients="averaged"):
        assert {cell.owner for cell in opt.cells} == {opt.world.rank}
    for opt in run_threads(2, work, gradients="averaged", owners=True):
        assert {cell.owner for cell in opt.cells} == {0, 1}


def test_a_world_of_two_optimizers_changes_for_both(double):
    """Both of a GAN's optimizers stand in one World; the second finds what the first has decided."""

    def work(world):
        first, second = (clone(m) for m in models)
        opts = [natgrad.KFAC(m, lr=0.05, world=world) for m in (first, second)]
        for k in range(3):
            for model, opt in zip((first, second), opts):
                averaged_step(model, opt, k, world)
        return [{cell.owner for cell in opt.cells} for opt in opts], weights(second)

    models = Mixed(), Mixed()
    found = run_threads(2, work)
    assert [owners for owners, _ in found] == [[{0}, {0}], [{1}, {1}]]
    assert torch.equal(found[0][1], found[1][1])


@every_optimizer
def test_one_ranks_part_is_loaded_and_the_rest_measured_again(kind, double):
    """Of ranks with gradients of their own, rank 0's state is a part. It loads with one warning on every rank."""

    def work(world):
        model = clone(start)
        opt = made(kind, model, lr=0.05, damping=0.03, refresh=2, world=world)
        for k in range(5):
            backward(model, tuple(t.chunk(world.size)[world.rank] for t in Mixed.batch(24, k)))
            opt.step()
            opt.zero_grad()
        return model, copy.deepcopy(opt.state_dict())

    start = Mixed()
    (model, part), _ = quiet(run_threads, 2, work)

    def resumed(world):
        mine = clone(model)
        opt = made(kind, mine, lr=0.05, damping=0.03, refresh=2, world=world)
        opt.load_state_dict(part)
        mine_before = weights(mine)
        for k in range(5, 9):
            backward(mine, tuple(t.chunk(world.size)[world.rank] for t in Mixed.batch(24, k)))
            opt.step()
            opt.zero_grad()
        return mine_before, weights(mine), opt

    for ranks in (1, 2):
        with heard() as said:
            results = run_threads(ranks, resumed)
        assert len([w for w in said if "measured again" in str(w.message)]) == 1
        assert len({tuple(final.tolist()) for _, final, _ in results}) == 1
        before, final, opt = results[0]
        assert opt.steps_made == 9
        assert all(cell.ready for cell in opt.cells)
        for p in opt._model.parameters():
            assert opt.state[p]["step"] == 9
        assert not torch.equal(before, final)


def test_of_a_part_nothing_stays_of_what_was_there_before(double):
    """What the part lacks begins anew, as if the optimizer had just been built, also where it has made steps."""
    model = mlp()
    opt = natgrad.KFAC(model, lr=0.05, length=natgrad.plain)
    train(opt, model, [points(12, k, torch.float64) for k in range(3)])
    part = copy.deepcopy(opt.state_dict())
    for key in ("A", "A_before", "A_inverse", "G", "G_before", "G_inverse", "momentum"):
        part["state"][2].pop(key, None)
    train(opt, model, [points(12, 3, torch.float64)])
    assert len(said_by(opt.load_state_dict, part)) == 1
    now = opt.state[model[2].weight]
    assert not any(now[key].any() for key in ("A", "A_inverse", "momentum"))
    assert opt.state[model[0].weight]["momentum"].any()


@every_optimizer
def test_keys_exist_from_the_start(kind):
    """Groups have all of their keys when an optimizer is built, the state has all of its names after the first step."""
    model = Mixed()
    opt = made(kind, model, lr=0.1)
    groups = [set(group) for group in opt.param_groups]
    named = None
    for k in range(6):
        backward(model, Mixed.batch(16, k))
        opt.step()
        opt.zero_grad()
        assert [set(group) for group in opt.param_groups] == groups
        names = [set(opt.state[p]) for p in model.parameters()]
        assert named is None or names == named
        named = names


@every_optimizer
def test_full_checkpoints_of_torch_load(kind, double):
    options = StateDictOptions(full_state_dict=True)
    model = Mixed()
    other = clone(model)
    opt, new = (made(kind, m, lr=0.05, damping=0.03) for m in (model, other))
    train(opt, model, [Mixed.batch(16, k) for k in range(3)])
    buffer = io.BytesIO()
    torch.save(get_state_dict(model, opt, options=options), buffer)
    buffer.seek(0)
    of_model, of_optimizer = torch.load(buffer, weights_only=True)
    set_state_dict(other, new, model_state_dict=of_model, optim_state_dict=of_optimizer, options=options)
    for o, m in ((opt, model), (new, other)):
        train(o, m, [Mixed.batch(16, 3)])
    assert torch.equal(weights(model), weights(other))


@every_optimizer
@pytest.mark.parametrize("steps", [0, 3])
def test_the_state_follows_a_model_to_another_type(kind, steps):
    """Before the first step it is as if the optimizer had been built after the move; later, what was kept moves."""
    model = Mixed()
    moved = clone(model)
    opt, ours = (made(kind, m, lr=0.05, rows_per_dim=None) for m in (model, moved))
    for o, m in ((opt, model), (ours, moved)):
        train(o, m, [Mixed.batch(16, k) for k in range(steps)])
    moved.double()
    if steps == 0:
        model = clone(moved)
        opt = made(kind, model, lr=0.05, rows_per_dim=None)
    kept = opt.state_dict()
    for k in range(3):
        train(ours, moved, [Mixed.batch(16, 10 + k)])
        train(opt, model, [Mixed.batch(16, 10 + k)])
        assert_close(weights(moved), weights(model).double(), rtol=0, atol=0 if steps == 0 else 1e-4)
    for state, theirs in zip(ours.state_dict()["state"].values(), kept["state"].values()):
        assert state.keys() == theirs.keys()
        assert {v.dtype for k, v in state.items() if k in ("momentum", "A", "first")} <= {torch.float64}


def test_an_optimizer_that_a_trainer_moves_by_its_state(double):
    """accelerate reads the state, moves the tensors, and loads them, before and after the model is moved."""
    model = mlp()
    with unwarned():
        opt = natgrad.SPNGD(model, lr=0.05)
        opt.load_state_dict(opt.state_dict())
        model.float()
        opt.load_state_dict(opt.state_dict())
        losses = train(opt, model, [points(12, 0)] * 8)
    assert losses[-1] < 0.9 * losses[0]


def test_reading_the_state_before_the_first_step_says_nothing():
    """accelerate reads it on every rank when it prepares an optimizer."""

    def work(world):
        opt = natgrad.SPNGD(mlp(), lr=0.05, world=world)
        opt.load_state_dict(opt.state_dict())

    with unwarned():
        run_threads(2, work)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["single", "bf16"])
@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_gradients_may_be_cleared_between_the_passes(precision, fisher):
    """As Lightning does in its closure: forward, zero_grad, backward. It is the run of the usual order."""
    start, ends = mlp(), []
    for between in (False, True):
        model = clone(start)
        opt = natgrad.SPNGD(model, lr=0.05, fisher=fisher)

        def closure(k, model=model, opt=opt, between=between):
            x, y = points(16, k)
            if not between:
                opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                output = model(x)
                if fisher == "sampled":
                    opt.sample(output)
                loss = F.cross_entropy(output, y)
            if between:
                opt.zero_grad()
            loss.backward()
            return loss.detach()

        with unwarned():
            for k in range(5):
                opt.step(lambda k=k: closure(k))
        assert all(row.curvature == "kronecker" for row in opt.coverage())
        ends.append(weights(model))
    assert torch.equal(*ends)


def test_outputs_that_nobody_uses_are_passed_on_by_wrappers():
    """Their hooks are called without a gradient, as DistributedDataParallel's are."""

    class PassedOn(torch.autograd.Function):
        """Hands on two tensors, and no gradient to the second one."""

        @staticmethod
        def forward(ctx, loss, logits):
            ctx.set_materialize_grads(False)
            return loss.view_as(loss), logits.view_as(logits)

        @staticmethod
        def backward(ctx, of_loss, of_logits):
            return of_loss, of_logits

    class Told(nn.Module):
        """Returns its loss, and its logits made anew."""

        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x, y):
            logits = self.body(x)
            return {"loss": F.cross_entropy(logits, y), "logits": logits * 1}

    model = Told()
    opt = natgrad.KFAC(model, lr=0.05)
    for _ in range(3):
        loss, _ = PassedOn.apply(*model(*points(16, 0)).values())
        loss.backward()
        opt.step()
        opt.zero_grad()
    assert opt.assumed.samples == 16
