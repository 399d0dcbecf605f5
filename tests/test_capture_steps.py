"""Which passes count for a step: those whose gradients it uses, and no others."""

import weakref

import torch
from torch import nn

import natgrad
from helpers import backward, clone, forget, hooks, mlp, points, statistic, train, weights
from natgrad.capture import samples_of


def spngd(model, **options):
    return natgrad.SPNGD(model, **{"lr": 0.05, "rows_per_dim": None, "refresh": 1, **options})


def final(disturb, steps=3):
    torch.manual_seed(0)
    model = mlp()
    opt = spngd(model)
    for k in range(steps):
        disturb(model, opt)
        train(opt, model, [points(12, k)])
    return weights(model)


def test_evaluation_leaves_nothing():
    def evaluate(model, opt):
        with torch.no_grad():
            model(points(50, 9)[0])
        model.eval()
        model(points(50, 9)[0])  # with a graph, without a backward pass
        model.train()

    assert torch.equal(final(evaluate), final(lambda model, opt: None))


def test_a_backward_pass_that_is_given_up_leaves_nothing():
    def discard(model, opt):
        backward(model, points(50, 9))
        opt.zero_grad()

    assert torch.equal(final(discard), final(lambda model, opt: None))


def test_a_failing_backward_pass_leaves_nothing():
    def fail(model, opt):
        x, _ = points(12, 9)
        out = model(x)
        out.register_hook(lambda g: 1 / 0)
        try:
            out.sum().backward()
        except ZeroDivisionError:
            opt.zero_grad()

    assert torch.equal(final(fail), final(lambda model, opt: None))


def test_gradients_of_inputs_alone_do_not_move_the_step():
    """A saliency map between steps, then zero_grad as always."""

    def saliency(model, opt):
        x = points(12, 9)[0].requires_grad_()
        torch.autograd.grad(model(x).sum(), x)
        opt.zero_grad()

    assert torch.equal(final(saliency), final(lambda model, opt: None))


def test_hooks_are_gone_when_nothing_is_due_and_when_the_optimizer_is():
    model = mlp()
    opt = spngd(model, refresh=10)
    assert hooks(model)
    train(opt, model, [points(12, 0)])
    assert not hooks(model)
    opt = spngd(model)
    assert hooks(model)
    del opt
    forget()
    assert not hooks(model)


def test_hooks_count_samples_not_places():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 3)).double()
    opt = spngd(model)
    x, y = torch.randn(10, 2, 4, 4, dtype=torch.float64), torch.randint(3, (10,))
    for part in zip(x.split([3, 7]), y.split([3, 7])):
        backward(model, part)
    assert opt.engine.capture.collect().samples == 10


def test_two_optimizers_at_once():
    models = [mlp(), mlp()]
    alone = [clone(m) for m in models]
    opts = [spngd(m) for m in models]
    for k in range(3):
        losses = sum(torch.nn.functional.cross_entropy(m(points(12, k)[0]), points(12, k)[1]) for m in models)
        losses.backward()  # one backward pass through both
        for opt in opts:
            opt.step()
            opt.zero_grad()
    for model, other in zip(models, alone):
        train(spngd(other), other, [points(12, k) for k in range(3)])
        torch.testing.assert_close(weights(model), weights(other))


def test_a_second_optimizer_on_the_same_model_takes_over():
    model = mlp()
    opt = spngd(model)
    train(opt, model, [points(12, 0)])
    alone = hooks(model)
    opt = spngd(model, damping=0.5)
    train(opt, model, [points(12, 1)])
    assert float(statistic(opt, "0", "A_damping")) == 0.5
    forget()
    assert hooks(model) == alone


def test_the_number_of_samples_is_what_most_layers_saw():
    """Given from the last layer to the first; places may be folded in, experts see a part."""
    assert samples_of([]) == 0
    assert samples_of([8, 8, 32]) == 8
    assert samples_of([32, 8, 8]) == 8
    assert samples_of([16, 8, 8, 16]) == 16  # a tie: the earlier layer's
    assert samples_of([8, 16]) == 16


def test_a_model_that_keeps_its_output_is_forgotten_with_its_optimizer():
    """The output holds the graph, the graph our hooks: nothing of that may lead back to the model."""

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, x):
            self.output = self.inner(x)
            return self.output

    model = Keeps()
    opt = spngd(model)
    train(opt, model, [points(12, 0)])
    gone = weakref.ref(model)
    del opt, model
    forget()
    assert gone() is None


def test_passes_that_do_not_count_leave_nothing_to_grow():
    """Saliency maps and evaluations between steps, with the hooks in place."""
    model = mlp()
    opt = spngd(model)
    x = points(12, 0)[0].requires_grad_()
    for _ in range(20):
        torch.autograd.grad(model(x).sum(), x)
        model(x)
    assert len(opt.engine.capture._told) <= 1
    train(opt, model, [points(12, 0)])
    assert not opt.engine.capture._told
    sampled = spngd(mlp(), fisher="sampled")
    for _ in range(3):
        out = sampled._model(points(12, 0)[0])
        sampled.sample(out)
        sampled._model(points(5, 1)[0])  # for which no labels are drawn
        out.sum().backward()
        sampled.step()
        sampled.zero_grad()
        assert not sampled.engine.capture.edges
