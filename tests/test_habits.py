"""What users of torch's optimizers are used to: groups in any form, no decay for vectors, unfreezing, schedules."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import natgrad
from helpers import OPTIMIZERS, Mixed, Net, backward, clone, made, mlp, points, train, weights

every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda o: o.__name__)
FORMS = {
    "parameters": lambda m: m.parameters(),
    "named": lambda m: m.named_parameters(),
    "groups": lambda m: [{"params": m[0].parameters()}, {"params": m[2].weight}, {"params": [m[2].bias]}],
    "named groups": lambda m: [{"params": m[0].named_parameters()}, {"params": list(m[2].named_parameters())}],
}


@every_optimizer
@pytest.mark.parametrize("form", FORMS)
def test_params_takes_every_form_that_torch_takes(kind, form):
    model = mlp()
    whole, own = clone(model), clone(model)
    torch.optim.AdamW(FORMS[form](model))  # torch takes it too
    opts = [made(kind, whole, lr=0.05), made(kind, own, lr=0.05, params=FORMS[form](own))]
    for k in range(3):
        for opt, m in zip(opts, (whole, own)):
            train(opt, m, [points(16, k)])
    assert_close(weights(own), weights(whole), rtol=1e-4, atol=1e-6)
    assert all("param_names" not in group for group in opts[1].param_groups)
    opts[1].load_state_dict(opts[1].state_dict())


def test_parameters_where_the_model_belongs_say_what_to_do():
    model = mlp()
    for given in (model.parameters(), model.named_parameters(), list(model.parameters())):
        with pytest.raises(ValueError, match=r"pass the model itself.*named parameters and groups go in params="):
            natgrad.SPNGD(given, lr=0.1)


def test_vectors_do_not_decay():
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.LayerNorm((3, 2, 2)), nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4)
    )
    model[0].bias.requires_grad_(False)
    decays, rest = natgrad.decay_groups(model, 0.1, lr=0.3)
    assert [id(p) for p in decays["params"]] == [id(model[0].weight), id(model[3].weight)]
    vectors = [model[0].bias, *model[1].parameters(), model[3].bias, *model[4].parameters()]
    assert [id(p) for p in rest["params"]] == [id(p) for p in vectors]
    assert (decays["weight_decay"], rest["weight_decay"], decays["lr"], rest["lr"]) == (0.1, 0.0, 0.3, 0.3)
    assert [g["weight_decay"] for g in natgrad.decay_groups(nn.Linear(2, 2, bias=False), 0.2)] == [0.2]
    natgrad.SPNGD(model, lr=0.1, params=natgrad.decay_groups(model, 0.1))


def test_only_matrices_move_where_only_decay_moves(double):
    """The groups reach the layers: a layer's weight decays and its bias does not."""
    model = Net()
    before = clone(model)
    opt = natgrad.KFAC(model, lr=0.1, momentum=0.0, params=natgrad.decay_groups(model, 0.5))
    backward(model, Net.batch(8, 0))
    for p in model.parameters():
        p.grad.zero_()
    opt.step()
    for p, q in zip(model.parameters(), before.parameters()):
        assert_close(p, q * (0.95 if p.dim() > 1 else 1.0), rtol=1e-12, atol=0)


@every_optimizer
def test_a_frozen_layer_of_a_group_trains_when_it_is_unfrozen(kind):
    """As Lightning's finetuning callbacks do it; with groups, in its own."""
    model = Mixed()
    model.head.requires_grad_(False)
    groups = natgrad.decay_groups(model, 0.0)
    groups[1]["lr"] = 0.02
    opt = made(kind, model, lr=0.05, params=groups)
    train(opt, model, [Mixed.batch(16, 0)])
    model.head.requires_grad_(True)
    before = model.head.weight.detach().clone()
    train(opt, model, [Mixed.batch(16, k) for k in range(1, 4)])
    assert not torch.equal(model.head.weight, before)
    assert opt.group_of(model.head.bias)["lr"] == 0.02
    assert opt.group_of(model.head.weight)["lr"] == 0.05


SCHEDULES = {
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=6, cycle_momentum=False),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "chained": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[2],
    ),
}


@pytest.mark.filterwarnings("ignore:.*epoch parameter.*")
@every_optimizer
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedulers_of_torch(kind, schedule):
    """They set the learning rate of every group, their own state comes back, and the run with it."""
    model = mlp()
    opt = made(kind, model, lr=0.1)
    plan = SCHEDULES[schedule](opt)
    rates = []
    for _ in range(5):
        rates.append(opt.param_groups[0]["lr"])
        train(opt, model, [points(16, 0)])
        plan.step(*([1.0] if schedule == "plateau" else []))
    assert len(set(rates)) > 1
    assert opt.param_groups[0]["lr_last"] == rates[-1]
