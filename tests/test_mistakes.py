"""Mistakes that a training loop makes by accident: harmless to the last bit, or said in one line."""

import io
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import natgrad
from helpers import OPTIMIZERS, Mixed, made, train, weights

every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda o: o.__name__)


def begun(kind, **options):
    torch.manual_seed(0)
    model = Mixed()
    return model, made(kind, model, lr=0.05, **options)


def backward(model, k, part=slice(None)):
    x, y = Mixed.batch(16, k)
    F.cross_entropy(model(x[part]), y[part]).backward()


def plainly(model, opt, k):
    backward(model, k)
    opt.step()
    opt.zero_grad()


def in_a_thread(model, opt, k):
    thread = threading.Thread(target=backward, args=(model, k))
    thread.start()
    thread.join()
    opt.step()
    opt.zero_grad()


def in_inference_mode(model, opt, k):
    backward(model, k)
    with torch.inference_mode():
        opt.step()
        opt.zero_grad()


def in_no_grad(model, opt, k):
    x, y = Mixed.batch(16, k)
    loss = F.cross_entropy(model(x), y)
    with torch.no_grad():
        loss.backward()
        opt.step()
        opt.zero_grad()


def evaluated_before(model, opt, k):
    with torch.inference_mode():
        model(Mixed.batch(16, 100)[0])
    plainly(model, opt, k)


def cleared_late(model, opt, k):
    x, y = Mixed.batch(16, k)
    loss = F.cross_entropy(model(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()


def cleared_to_zeros(model, opt, k):
    backward(model, k)
    opt.step()
    opt.zero_grad(set_to_none=False)


def by_closure(model, opt, k):
    def closure():
        opt.zero_grad()
        backward(model, k)

    opt.step(closure)


def after_an_error(model, opt, k):
    x, y = Mixed.batch(16, k)
    output = model(x)
    with pytest.raises(ValueError, match="batch_size"):
        F.cross_entropy(output, y[:3])
    plainly(model, opt, k)


def after_an_interrupt(model, opt, k):
    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.head.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        backward(model, k)
    handle.remove()
    plainly(model, opt, k)


HABITS = [
    in_a_thread,
    in_inference_mode,
    in_no_grad,
    evaluated_before,
    cleared_late,
    cleared_to_zeros,
    by_closure,
    after_an_error,
    after_an_interrupt,
]


@pytest.mark.filterwarnings("ignore:NLCG was told no loss")
@pytest.mark.parametrize("habit", HABITS, ids=lambda habit: habit.__name__)
@every_optimizer
def test_a_habit_changes_no_bit(kind, habit):
    found = []
    for steps in (plainly, habit):
        model, opt = begun(kind)
        for k in range(4):
            steps(model, opt, k)
        found.append(weights(model))
    assert torch.equal(*found)


@every_optimizer
def test_an_optimizer_that_was_built_before_and_lives_on_changes_no_bit(kind):
    """A cell of a notebook that is run again, while a traceback keeps the first one."""
    model, opt = begun(kind)
    again, first = begun(kind)
    second = made(kind, again, lr=0.05)
    for k in range(3):
        train(opt, model, [Mixed.batch(16, k)])
        train(second, again, [Mixed.batch(16, k)])
    assert torch.equal(weights(model), weights(again))
    assert first.steps_made == 0


@every_optimizer
def test_numbers_of_numpy_do_not_end_in_a_checkpoint(kind):
    """torch.load refuses what holds them."""
    model, opt = begun(kind, params=None)
    opt.param_groups[0]["lr"] = np.float32(0.04)
    train(opt, model, [Mixed.batch(16, 0)])
    opt.param_groups[0] |= {"lr": np.float64(0.03), "weight_decay": np.float32(0)}
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded["param_groups"][0]["lr"]) is float
    fresh = made(kind, Mixed(), lr=np.float32(0.05))
    assert type(fresh.param_groups[0]["lr"]) is float
    fresh.load_state_dict(loaded)
    assert fresh.param_groups[0]["lr"] == 0.03


@every_optimizer
def test_a_loss_where_a_closure_belongs_says_what_to_do(kind):
    model, opt = begun(kind)
    x, y = Mixed.batch(16, 0)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    before = weights(model)
    with pytest.raises(ValueError, match=r"step\(Tensor\): closure= is a function.*step\(loss=loss\)"):
        opt.step(loss)
    assert torch.equal(weights(model), before)


SUBSETS = [(natgrad.KFAC, natgrad.SPNGD)]
"""(here, saved): all that the one keeps the other keeps too."""
PAIRS = [(a, b) for a in OPTIMIZERS for b in OPTIMIZERS if a is not b and (a, b) not in SUBSETS]


@pytest.mark.parametrize(("kind", "other"), PAIRS, ids=[f"{b.__name__} in {a.__name__}" for a, b in PAIRS])
def test_the_state_of_another_optimizer_is_refused(kind, other):
    model, opt = begun(other)
    train(opt, model, [Mixed.batch(16, k) for k in range(2)])
    _, here = begun(kind)
    with pytest.raises(ValueError, match="it is of another optimizer"):
        here.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("twice", ["the same optimizer", "another one"])
@every_optimizer
def test_gradients_that_are_in_two_steps_are_said_once(kind, twice, recwarn):
    model, opt = begun(kind)
    other = opt if twice == "the same optimizer" else made(kind, model, lr=0.05)
    for k in range(3):
        plainly(model, opt, k)
        backward(model, k, slice(8))
        backward(model, k, slice(8, 16))
        opt.step()
        opt.zero_grad(set_to_none=False)
    assert not [w for w in recwarn if "in a step before" in str(w.message)]
    for k in range(2):
        backward(model, k)
        opt.step()
        other.step()
        opt.zero_grad()
    assert len([w for w in recwarn if "in a step before" in str(w.message)]) == 1


def zeroed_by_model(model, opt):
    model.zero_grad(set_to_none=False)


def zeroed_through_data(model, opt):
    for p in model.parameters():
        p.grad.data.zero_()


CLEARED = [lambda model, opt: opt.zero_grad(), zeroed_by_model, zeroed_through_data]


@pytest.mark.parametrize("kind", [natgrad.SPNGD, natgrad.KFAC, natgrad.SENG], ids=lambda o: o.__name__)
def test_a_forgotten_zero_grad_is_said_once(kind, recwarn):
    def said():
        return [w for w in recwarn if "an earlier step has taken" in str(w.message)]

    model, opt = begun(kind, refresh=1)
    for clear in CLEARED:
        for k in range(2):
            for part in (slice(8), slice(8, 16)):
                backward(model, k, part)
            opt.step()
            clear(model, opt)
    opt.zero_grad()
    assert not said()
    for k in range(3):
        backward(model, k)
        opt.step()
    assert len(said()) == 1


class Waiting(nn.Module):
    """Passes on, but the first forward or backward pass through it waits until another thread has come and gone."""

    def __init__(self, when):
        super().__init__()
        self.when, self.inside, self.go = when, threading.Event(), threading.Event()

    def wait(self):
        if not self.inside.is_set():
            self.inside.set()
            assert self.go.wait(60)

    def forward(self, x):
        if self.when == "forward":
            self.wait()
        elif x.requires_grad:
            x.register_hook(lambda _: self.wait())
        return x * 1.0


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("kind", [natgrad.SPNGD, natgrad.SENG], ids=lambda o: o.__name__)
def test_passes_of_two_threads_at_once_are_refused(kind, when):
    """Nothing that a pass leaves says of which thread it is."""
    torch.manual_seed(0)
    between = Waiting(when)
    model = nn.Sequential(nn.Linear(4, 4), between, nn.Linear(4, 3))
    opt = made(kind, model, lr=0.05)
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    refused = []

    def passes():
        try:
            F.cross_entropy(model(x), y).backward()
        except ValueError as error:
            refused.append(str(error))

    thread = threading.Thread(target=passes)
    thread.start()
    assert between.inside.wait(60)
    passes()
    between.go.set()
    thread.join()
    assert len(refused) == 1
    assert "two threads pass through the model at the same time" in refused[0]
    opt.zero_grad()
    passes()
    opt.step()
    assert len(refused) == 1
    assert opt.preconditioned.layers == 2


class Masked(nn.Module):
    """A weight that is changed before its use, at the end of a part that is computed again."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def part(self, x):
        return F.linear(torch.tanh(self.first(x)), self.last.weight * 0.5, self.last.bias)

    def forward(self, x):
        return self.head(checkpoint(self.part, x.requires_grad_(), use_reentrant=True))


def test_a_pass_within_a_pass_is_no_second_thread():
    """Reentrant checkpointing: gradients of a weight that no call is known of come with a later pass's number."""
    torch.manual_seed(0)
    model = Masked()
    opt = natgrad.SPNGD(model, lr=0.05)
    for _ in range(3):
        F.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 3).backward()
        opt.step()
        opt.zero_grad()
    assert opt.steps_made == 3
    assert opt.preconditioned.layers >= 1
