"""NLCG in the mode "faithful" on the worked run of its specification, to nine digits."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import natgrad

CURVATURES = (4.0, 1.0, 0.25)
LOSSES = (5.0, 4.5, 4.6, 5.6, 6.4, 5.0, 4.0)
BETAS = (0.0, 0.2794595778, 0.6536024074, 0.5966829777, 0.6026303698, 1.0, 0.6858788206)
MULTIPLIERS = (1.0, 1.0, 1.0, 1.0, 0.7, 0.7, 0.735)
AVERAGES = (5.0, 4.85, 4.775, 5.0225, 5.43575, 5.305025, 4.9135175)
WEIGHTS = (
    (0.6, -1.8, 2.925),
    (0.4278967919, -1.5358165159, 2.8288987481),
    (0.2721879606, -1.2018017006, 2.6899964794),
    (0.1524030195, -0.8841626009, 2.52886309),
    (0.2180137071, -1.048777926, 2.6038960868),
    (0.1425326774, -0.7870091391, 2.4184151721),
    (0.078350015, -0.5467379614, 2.2133786393),
)
HESSIANS = (
    (1.0, 1.0, 1.0),
    (3.9788209297, 0.8641732318, 0.973160281),
    (3.9600126253, 0.9518903018, 0.9294549508),
    (4.0509990199, 1.0155657644, 0.8593933617),
    (4.156848104, 1.0589340358, 0.76440012),
    (4.156848104, 1.0589340358, 0.76440012),
    (4.2658464362, 1.1177286545, 0.6218790748),
)
PR_BETAS = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0472620511, 0.0)
PR_WEIGHTS = (0.4016261691, -1.1963731703, 2.5546829926)
EXACT = {"rtol": 0, "atol": 1e-9}


class Bowl(nn.Module):
    """Half x . H x with H diagonal."""

    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.tensor((1.0, -2.0, 3.0)))

    def forward(self):
        return (torch.tensor(CURVATURES) * self.x.square()).sum() / 2


def run(beta):
    """(beta, b, E, x, h) after each step."""
    model = Bowl()
    search = natgrad.Scheduled(period=2)
    opt = natgrad.NLCG(model, lr=0.1, beta=beta, step=search, mode="faithful")
    for loss in LOSSES:
        opt.zero_grad()
        model().backward()
        opt.step(loss=loss)
        state = opt.state[model.x]
        memory = opt.memory
        values = model.x.detach().clone(), state["nlcg_hessian"].flatten().clone()
        yield opt.last_beta, memory.multiplier, memory.average, *values


def test_fletcher_reeves(double):
    for k, (beta, multiplier, average, x, h) in enumerate(run(natgrad.optim.fletcher_reeves)):
        assert beta == pytest.approx(BETAS[k], abs=1e-9)
        assert multiplier == pytest.approx(MULTIPLIERS[k], abs=1e-9)
        assert average == pytest.approx(AVERAGES[k], abs=1e-9)
        assert_close(x, torch.tensor(WEIGHTS[k]), **EXACT)
        assert_close(h, torch.tensor(HESSIANS[k]), **EXACT)


def test_polak_ribiere(double):
    rows = list(run(natgrad.optim.polak_ribiere))
    assert [row[0] for row in rows] == pytest.approx(PR_BETAS, abs=1e-9)
    assert_close(rows[-1][3], torch.tensor(PR_WEIGHTS), **EXACT)


def test_the_hardened_mode_differs_where_it_says_so(double):
    """Its secant is the last displacement; with a constant rate and no undo that is the release's, but for eps."""
    faithful, hardened = Bowl(), Bowl()
    opts = [natgrad.NLCG(m, lr=0.1, mode=mode) for m, mode in ((faithful, "faithful"), (hardened, "hardened"))]
    for _ in range(4):
        for model, opt in zip((faithful, hardened), opts):
            opt.zero_grad()
            loss = model()
            loss.backward()
            opt.step(loss=loss)
    assert_close(hardened.x, faithful.x, rtol=1e-6, atol=0)
    for opt in opts:
        opt.param_groups[0]["lr"] = 0.01
    for model, opt in zip((faithful, hardened), opts):
        opt.zero_grad()
        loss = model()
        loss.backward()
        opt.step(loss=loss)
    hessians = [opt.state[m.x]["nlcg_hessian"] for m, opt in zip((faithful, hardened), opts)]
    assert (hessians[0] / hessians[1] - 1).abs().max() > 0.5  # the release divides an old step by ten
