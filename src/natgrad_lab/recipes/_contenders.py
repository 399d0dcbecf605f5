"""The four optimizers and SGD beside each other, on ResNets with BatchNorm and batches of some hundred to 16,384.

Ours, all of it: one schedule, one weight decay, one length of run. SP-NGD, K-FAC and SENG have their defaults and the
learning rate of 0.1 that docs/settings.md gives to everyone; SGD's rate is a round number, not tuned. NLCG goes without
a learning rate: K-FAC as its preconditioner, and the minimum along the direction.
"""

from natgrad_lab.train.optimizers import KFac, Nlcg, Seng, Settings, Sgd, SpNgd

DECAY = 5e-4


def contenders(rate: float) -> dict[str, tuple[str, Settings]]:
    """Return each one's title and settings by its name in recipes; `rate` is SGD's learning rate."""
    return {
        "sgd": ("SGD with Nesterov momentum", Sgd(lr=rate, momentum=0.9, nesterov=True, weight_decay=DECAY)),
        "spngd": ("SP-NGD", SpNgd(lr=0.1, weight_decay=DECAY)),
        "kfac": ("K-FAC", KFac(lr=0.1, weight_decay=DECAY)),
        "seng": ("SENG", Seng(lr=0.1, weight_decay=DECAY)),
        "nlcg": (
            "NLCG",
            Nlcg(
                lr=1.0,
                preconditioner="kronecker",
                beta="polak_ribiere",
                step="curvature",
                fisher="sampled",
                refresh=5,
                weight_decay=DECAY,
            ),
        ),
    }
