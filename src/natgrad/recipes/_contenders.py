"""The four optimizers and SGD beside each other, on ResNets with BatchNorm and batches of some hundred to 16,384.

Ours, all of it: one schedule, one weight decay, one length of run; learning rates that are round numbers, not tuned.
SENG takes each sample's gradient over the norm of its logits', which learned faster than its plain columns, and 0.03 at
a damping of 0.3, because 0.1 at 0.03 diverged on a folder of images. NLCG goes
without a learning rate: K-FAC as its preconditioner, and the minimum along the direction.
"""

from natgrad.train.optimizers import KFac, Nlcg, Seng, Settings, Sgd, SpNgd

DECAY = 5e-4


def contenders(rate: float) -> dict[str, tuple[str, Settings]]:
    """Return each one's title and settings by its name in recipes; `rate` is SGD's learning rate."""
    return {
        "sgd": ("SGD with Nesterov momentum", Sgd(lr=rate, momentum=0.9, nesterov=True, weight_decay=DECAY)),
        "spngd": ("SP-NGD", SpNgd(lr=0.05, damping=1e-3, weight_decay=DECAY)),
        "kfac": ("K-FAC", KFac(lr=0.05, damping=1e-3, weight_decay=DECAY)),
        "seng": ("SENG", Seng(lr=0.03, damping=0.3, columns="improved", weight_decay=DECAY, refresh=5)),
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
