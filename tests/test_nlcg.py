"""What users rely on, for NLCG: losses told in any way, mixed precision, micro-batches, groups."""

import warnings

import pytest
import torch
from torch.amp import GradScaler
from torch.nn import functional as F
from torch.testing import assert_close

import natgrad
from helpers import Mixed, Net, backward, clone, mlp, points, train, weights
from natgrad.curvature import SampleSpace
from natgrad.optim.betas import BETAS
from natgrad.optim.seng import SampleBlocks
from nlcg_choices import METRICS, QUIET, nlcg, told

every_metric = pytest.mark.parametrize("metric", METRICS)


@every_metric
@pytest.mark.parametrize("beta", BETAS.values(), ids=BETAS)
def test_every_metric_and_beta_trains_all_parameters(metric, beta):
    options = {**METRICS[metric], "beta": beta}
    model, batch = Mixed(), Mixed.batch(32, 0)
    if metric == "faithful" and beta not in (natgrad.optim.fletcher_reeves, natgrad.optim.polak_ribiere):
        with pytest.raises(ValueError, match=r"faithful.*hardened"):
            nlcg(model, **options)
        return
    before = [p.detach().clone() for p in model.parameters()]
    losses = told(nlcg(model, **options), model, [batch] * 40)
    assert losses[-1] < 0.8 * losses[0]
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before))


def test_the_strong_choice_needs_no_learning_rate():
    model, (x, y) = mlp(), points(64, 0)
    line = natgrad.CurvatureStep()
    options = {"preconditioner": natgrad.spngd_blocks, "beta": natgrad.optim.polak_ribiere, "fisher": "sampled"}
    opt = natgrad.NLCG(model, step=line, **options)
    losses = []
    for _ in range(30):
        output = model(x)
        loss = F.cross_entropy(output, y)
        opt.sample(output)
        loss.backward()
        opt.step(forward=lambda: model(x))
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_loss_may_be_told_in_three_ways():
    start, batches = mlp(), [points(16, k) for k in range(8)]
    ends = []
    for way in ("closure", "loss", "report", "parts"):
        model = clone(start)
        opt = nlcg(model, step=natgrad.Scheduled("online", tau=0.01))
        for batch in batches:
            opt.zero_grad()
            if way == "closure":
                opt.step(lambda m=model, b=batch: backward(m, b))
                continue
            loss = backward(model, batch)
            if way == "loss":
                opt.step(loss=loss)
            else:
                for _ in range(4 if way == "parts" else 1):
                    opt.report(loss / (4 if way == "parts" else 1))
                opt.step()
        ends.append((weights(model), opt.multiplier))
    assert ends[0][1] < 1
    for found, multiplier in ends[1:]:
        assert_close(found, ends[0][0])
        assert multiplier == ends[0][1]


def test_without_a_loss_it_says_so_once_and_follows_the_schedule():
    model, other = mlp(), mlp()
    other.load_state_dict(model.state_dict())
    opt = nlcg(model)
    with pytest.warns(natgrad.NatgradWarning, match="told no loss") as found:
        train(opt, model, [points(8, k) for k in range(6)])
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(nlcg(other, step=QUIET), other, [points(8, k) for k in range(6)])
    assert torch.equal(weights(model), weights(other))


@pytest.mark.parametrize("mode", ["hardened", "faithful"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_not_heard(mode, value):
    model = mlp()
    opt = nlcg(model, mode=mode)
    told(opt, model, [points(16, k) for k in range(3)])
    before, h = opt.memory, opt.state[model[0].weight]["nlcg_hessian"].clone()
    backward(model, points(16, 3))
    opt.step(loss=value)
    opt.zero_grad()
    after = opt.memory
    assert (after.average, after.multiplier, after.told) == (before.average, before.multiplier, 3)
    if mode == "hardened":
        assert opt.last_beta == 0
        assert torch.equal(opt.state[model[0].weight]["nlcg_hessian"], h)
    losses = told(opt, model, [points(16, k) for k in range(4, 8)])
    assert all(torch.isfinite(torch.tensor(losses)))


@pytest.mark.parametrize("spoil", ["gradient", "scaler"])
def test_a_gradient_that_is_not_finite_skips_the_step_and_its_loss(spoil):
    model = mlp()
    other = clone(model)
    good = [points(16, k) for k in range(4)]
    told(nlcg(model), model, good)
    opt, scaler = nlcg(other), GradScaler("cpu", init_scale=8.0)
    for k, (x, y) in enumerate([good[0], good[1], points(16, 9), good[2], good[3]]):
        loss = F.cross_entropy(other(x), y)
        factor = float("inf") if k == 2 else 1.0
        if spoil == "gradient":
            (loss * factor).backward()
            opt.step(loss=loss.detach() * 100 if k == 2 else loss)
        else:
            scaler.scale(loss * factor).backward()
            scaler.step(opt, loss=loss.detach() * 100 if k == 2 else loss)
            scaler.update()
        opt.zero_grad()
    assert opt.skipped == 1
    assert_close(weights(other), weights(model))


@every_metric
def test_micro_batches_are_a_batch(metric, double):
    model = Mixed()
    whole, parts = clone(model), clone(model)
    options = {**METRICS[metric]}
    if metric == "kronecker":
        options["rows_per_dim"] = None
    if metric == "sketch":
        options["preconditioner"] = SampleBlocks(SampleSpace())  # of all samples
    opts = [nlcg(m, **options) for m in (whole, parts)]
    for k in range(5):
        x, y = Mixed.batch(24, k)
        opts[0].report(backward(whole, (x, y)))
        for part in zip(x.chunk(4), y.chunk(4)):
            loss = F.cross_entropy(parts(part[0]), part[1]) / 4
            loss.backward()
            opts[1].report(loss)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        assert_close(weights(parts), weights(whole), rtol=1e-9, atol=1e-9)


def test_each_parameter_has_its_own_groups_numbers(double):
    """A weight and a bias of one layer in two groups, under a scheduler: the other group's is as if all had its lr."""
    start, ends = mlp(), {}
    for name, lrs in {"both": (0.1, 0.03), "same": (0.1, 0.1)}.items():
        model = clone(start)
        biases = [p for p in model.parameters() if p.dim() == 1]
        others = [p for p in model.parameters() if p.dim() > 1]
        opt = nlcg(model, params=[{"params": others, "lr": lrs[0]}, {"params": biases, "lr": lrs[1]}], step=QUIET)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: [1.0, 0.0][k])
        train(opt, model, [points(8, 0, torch.float64)])
        ends[name] = [p.detach() - q.detach() for p, q in zip(model.parameters(), start.parameters())]
        schedule.step()
        before = weights(model)
        train(opt, model, [points(8, 1, torch.float64)])
        assert torch.equal(weights(model), before)
    for mixed, same in zip(ends["both"], ends["same"]):
        assert_close(mixed, same * (0.3 if mixed.dim() == 1 else 1.0))


@pytest.mark.parametrize("line", [False, True])
def test_bf16_autocast_keeps_single_precision_state(line):
    model = Net()
    x, y = Net.batch(32, 0)
    opt = natgrad.NLCG(model, step=natgrad.CurvatureStep()) if line else nlcg(model)
    losses = []
    for _ in range(20):

        def forward():
            with torch.autocast("cpu", torch.bfloat16):
                return model(x.float())

        loss = F.cross_entropy(forward(), y)
        loss.backward()
        opt.step(forward=lambda: model(x.float())) if line else opt.step(loss=loss)
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    floats = [v.dtype for s in opt.state.values() for k, v in s.items() if k.startswith("nlcg_")]
    assert set(floats) == {torch.float32}


@pytest.mark.slow
def test_compiled_models():
    model = mlp()
    other = clone(model)
    compiled = torch.compile(model, backend="aot_eager")
    batches = [points(16, k) for k in range(5)]
    for line in (False, True):
        options = {"step": natgrad.CurvatureStep(), "lr": 1.0} if line else {}
        opts = natgrad.NLCG(compiled, **options), natgrad.NLCG(other, **options)
        for x, y in batches:
            for m, opt in zip((compiled, other), opts):
                loss = backward(m, (x, y))
                opt.step(forward=lambda m=m, v=x: m(v)) if line else opt.step(loss=loss)
                opt.zero_grad()
        assert_close(weights(model), weights(other), rtol=1e-4, atol=1e-5)
