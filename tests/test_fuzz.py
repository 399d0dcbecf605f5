"""Random small programs are what a dense reference says: some of the thousands that benchmarks/fuzz.py makes."""

import ast
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import natgrad
from helpers import said_by

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import fuzz
import fuzz_reference
from fuzz_programs import Program

SHARE = 40


def test_random_programs_take_the_steps_of_the_reference():
    found = fuzz.run(SHARE, stop=True)
    assert found["programs"] >= SHARE
    assert {"SPNGD", "KFAC", "SENG", "NLCG", "2 ranks", "frozen"} <= found["counted"].keys()


def test_a_formula_that_is_off_by_a_thousandth_is_found(monkeypatch):
    settings = {"reduction": "mean", "refresh": 1, "weight_decay": 0.0, "max_norm": None, "ema_decay": 0.0}
    settings |= {"curvature": ("kron", "unit"), "max_size": 8192, "momentum": 0.0, "before": False, "decoupled": True}
    settings |= {"coefficient": "corrected", "length": "plain", "rescale": None}
    layer = ("Linear", {"in_features": 3, "out_features": 3, "bias": True})
    program = Program((layer, layer), ("vector", 3), settings=settings)
    assert fuzz.check(program) < 1e-10
    right = natgrad.curvature.Kronecker.split
    monkeypatch.setattr(
        natgrad.curvature.Kronecker, "split", lambda self, traces, damping: right(self, traces, 1.001 * damping)
    )
    with pytest.raises(fuzz.DifferenceError, match="of the way"):
        fuzz.check(program)


def test_the_reference_knows_nothing_of_natgrad():
    tree = ast.parse(Path(fuzz_reference.__file__).read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    known = {"__future__", "math", "collections", "dataclasses", "typing", "torch"}
    assert {name.partition(".")[0] for name in modules} <= known


def test_a_gradient_that_torch_gets_wrong_is_noticed():
    """The fuzz found it: batch statistics of one image, where gradients have channels last (torch 2.13 and 2.14)."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.InstanceNorm2d(2, affine=True))
    opt = natgrad.SPNGD(model, lr=0.1, predictions=1)
    y = model(torch.randn(1, 2, 3, 3))
    (sent,) = torch.autograd.grad((loss := y.tanh().flatten(2).movedim(1, -1).mean(1).sum()), y, retain_graph=True)
    loss.backward()
    if torch.allclose(model[1].bias.grad, sent.sum((0, 2, 3))):
        pytest.skip("this torch gets it right")
    assert any("do not account for its gradient" in line for line in said_by(opt.step))
    assert bool(torch.isfinite(model[1].weight).all())
