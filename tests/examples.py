"""An example of every layer type that is registered: how to build a module, and an input for it.

Whoever registers a new type adds a line here; test_laws_layers.py says so when one is missing.
"""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm


def normal(*shape):
    return lambda: torch.randn(*shape, dtype=torch.float64)


def tokens(high, *shape):
    return lambda: torch.randint(high, shape)


def shifted(module):
    """A norm whose parameters and running statistics are not those of a fresh one."""
    for p in module.parameters():
        p.data.uniform_(0.5, 1.5)
    if getattr(module, "running_mean", None) is not None:
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2)
    return module


# type: [(name, build, input)]
EXAMPLES = {
    nn.Linear: [
        ("2-D", lambda: nn.Linear(4, 3), normal(5, 4)),
        ("no bias", lambda: nn.Linear(4, 3, bias=False), normal(5, 4)),
        ("3-D", lambda: nn.Linear(4, 3), normal(5, 6, 4)),
        ("4-D", lambda: nn.Linear(4, 3), normal(3, 2, 4, 4)),
    ],
    nn.Conv1d: [
        ("stride", lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), normal(5, 3, 9)),
        ("one place", lambda: nn.Conv1d(3, 4, 4), normal(5, 3, 4)),
    ],
    nn.Conv2d: [
        ("plain", lambda: nn.Conv2d(2, 3, 3, padding=1), normal(4, 2, 5, 6)),
        ("offsets", lambda: nn.Conv2d(8, 3, 3, padding=1), normal(4, 8, 5, 6)),
        ("depthwise", lambda: nn.Conv2d(4, 8, 3, groups=4, stride=2), normal(3, 4, 7, 6)),
        ("same, even kernel", lambda: nn.Conv2d(2, 3, (2, 4), padding="same", bias=False), normal(3, 2, 5, 6)),
    ],
    nn.Conv3d: [("dilated", lambda: nn.Conv3d(2, 3, 2, dilation=2, padding=1), normal(3, 2, 4, 5, 4))],
    nn.ConvTranspose1d: [("stride", lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), normal(5, 3, 6))],
    nn.ConvTranspose2d: [
        ("padding", lambda: nn.ConvTranspose2d(2, 3, 3, 2, 1, output_padding=1), normal(4, 2, 5, 4)),
        ("dilated", lambda: nn.ConvTranspose2d(2, 3, (2, 3), dilation=2, bias=False), normal(4, 2, 3, 4)),
    ],
    nn.ConvTranspose3d: [("plain", lambda: nn.ConvTranspose3d(2, 3, 2), normal(3, 2, 3, 2, 3))],
    nn.Embedding: [
        ("tokens", lambda: nn.Embedding(7, 3), tokens(7, 5, 4)),
        ("one token", lambda: nn.Embedding(7, 3), tokens(7, 5)),
        ("padding", lambda: nn.Embedding(7, 3, padding_idx=2), tokens(7, 5, 4)),
    ],
    nn.LayerNorm: [
        ("2-D", lambda: shifted(nn.LayerNorm(6)), normal(5, 6)),
        ("no shift", lambda: shifted(nn.LayerNorm(6, bias=False)), normal(5, 3, 6)),
        ("two dimensions", lambda: shifted(nn.LayerNorm((2, 3))), normal(5, 4, 2, 3)),
    ],
    nn.RMSNorm: [("3-D", lambda: shifted(nn.RMSNorm(6, eps=1e-5)), normal(5, 3, 6))],
    nn.GroupNorm: [
        ("images", lambda: shifted(nn.GroupNorm(2, 4)), normal(5, 4, 3, 2)),
        ("vectors", lambda: shifted(nn.GroupNorm(2, 4)), normal(5, 4)),
    ],
    _InstanceNorm: [
        ("1d", lambda: shifted(nn.InstanceNorm1d(4, affine=True)), normal(5, 4, 6)),
        ("2d", lambda: shifted(nn.InstanceNorm2d(4, affine=True)), normal(5, 4, 3, 2)),
    ],
    _BatchNorm: [
        ("1d vectors", lambda: shifted(nn.BatchNorm1d(4)), normal(6, 4)),
        ("1d lines", lambda: shifted(nn.BatchNorm1d(4)), normal(6, 4, 3)),
        ("2d", lambda: shifted(nn.BatchNorm2d(4)), normal(6, 4, 3, 2)),
        ("3d", lambda: shifted(nn.BatchNorm3d(2)), normal(6, 2, 2, 3, 2)),
        ("eval", lambda: shifted(nn.BatchNorm2d(4)).eval(), normal(6, 4, 3, 2)),
        ("never running", lambda: shifted(nn.BatchNorm2d(4, track_running_stats=False)).eval(), normal(6, 4, 3, 2)),
    ],
}

# a registered type that gives no layer, or a variant of one: (build, a part of the reason)
REFUSED = {
    nn.SyncBatchNorm: (lambda: nn.SyncBatchNorm(3), "spread over ranks"),
    nn.Module: (lambda: nn.Bilinear(2, 2, 2), "no layer is registered for Bilinear"),
    nn.ConvTranspose2d: (lambda: nn.ConvTranspose2d(2, 2, 2, groups=2), "in groups is not known"),
    nn.BatchNorm1d: (lambda: nn.BatchNorm1d(3, affine=False), "no scale"),
    nn.LayerNorm: (lambda: nn.LayerNorm(3, elementwise_affine=False), "no scale"),
    nn.GroupNorm: (lambda: nn.GroupNorm(1, 3, affine=False), "no scale"),
    nn.RMSNorm: (lambda: nn.RMSNorm(3, elementwise_affine=False), "no scale"),
    nn.InstanceNorm1d: (lambda: nn.InstanceNorm1d(3), "no scale"),
    nn.InstanceNorm2d: (lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), "running"),
    nn.Embedding: (lambda: nn.Embedding(3, 2, sparse=True), "sparse"),
    nn.EmbeddingBag: (lambda: nn.EmbeddingBag(3, 2), "no layer is registered for EmbeddingBag"),
}

CASES = [(name, build, data) for rows in EXAMPLES.values() for name, build, data in rows]
NAMES = [f"{t.__name__}-{name}" for t, rows in EXAMPLES.items() for name, _, _ in rows]


def looks_across_samples(module):
    """Whether a sample's output depends on the other samples."""
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
