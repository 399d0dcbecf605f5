"""What NLCG's tests share: its metrics, and a loop that tells the loss."""

import natgrad
from helpers import backward
from natgrad.curvature import SampleSpace
from natgrad.optim.seng import SampleBlocks

QUIET = natgrad.Scheduled(feedback=None)
SAMPLED = SampleBlocks(SampleSpace(samples=16))
METRICS = {
    "bfgs": {},
    "identity": {"preconditioner": None},
    "second moment": {"preconditioner": natgrad.SecondMoment(), "lr": 0.01},
    "kronecker": {"preconditioner": natgrad.spngd_blocks, "damping": 0.03},
    "sketch": {"preconditioner": SAMPLED, "damping": 1.0},
    "faithful": {"mode": "faithful"},
}


def nlcg(model, **options):
    return natgrad.NLCG(model, **{"lr": 0.05, **options})


def told(opt, model, batches):
    """Train, damping_tolerance the loss; returns the losses."""
    losses = []
    for batch in batches:
        losses.append(backward(model, batch))
        opt.step(loss=losses[-1])
        opt.zero_grad()
    return [float(loss) for loss in losses]
