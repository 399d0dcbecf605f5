"""What the recipes of SENG share: the settings of its release under the library's names."""

from natgrad_lab.train.optimizers import Seng


def released(*, c: int, lr: float, damping: float, weight_decay: float, refresh: int) -> Seng:
    """The release's curvature with its column budget c, of all 256 samples of a step, without its errors."""
    return Seng(
        lr=lr,
        momentum=0.9,
        damping=damping,
        weight_decay=weight_decay,
        refresh=refresh,
        samples=256,
        sketch="count",
        sketch_size=c * c,
        length="plain",
        legacy=True,
        legacy_c=c,
        legacy_threshold=700_000,
    )
