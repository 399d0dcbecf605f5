"""What each part of a refresh takes: measure, invert, precondition, pack; medians by pytest-benchmark, one thread.

    python benchmarks/micro.py           (a minute; writes results/micro-cpu.json)
    python -m pytest benchmarks/micro.py (the same on the screen)

Shapes are those of ResNet-20 on CIFAR at batch 128, and of a linear layer of 1,024.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from record import Record
from torch import nn

import natgrad
from natgrad.capture import Sampler
from natgrad.curvature.curvature import RowSum
from natgrad.layers import layer_of
from natgrad.parallel.packing import pack, unpack

ROUNDS = {"rounds": 15, "warmup_rounds": 2}
LAYERS = {
    "conv 16, 32x32": (lambda: nn.Conv2d(16, 16, 3, padding=1, bias=False), (128, 16, 32, 32)),
    "conv 64, 8x8": (lambda: nn.Conv2d(64, 64, 3, padding=1, bias=False), (128, 64, 8, 8)),
    "linear 1024": (lambda: nn.Linear(1024, 1024), (128, 1024)),
}
NORM = (lambda: nn.BatchNorm2d(16), (128, 16, 32, 32))
SIDES = (64, 144, 576, 1025)


def measured(curvature, module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """All statistics of one layer, as the hooks measure them."""
    layer, draw = layer_of(module), Sampler(0, 0, 0, 1.0).draw(0, 0, x.device)
    found = {}
    for statistic in curvature.statistics:
        part = statistic.after(layer, statistic.before(layer, x, draw), dy, draw)
        found[statistic.key] = statistic.close([part.total if isinstance(part, RowSum) else part])
    return found


def alone(benchmark, call, *given):
    """One thread, some rounds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        benchmark.pedantic(call, args=given, **ROUNDS)


def batch(build, shape):
    torch.manual_seed(0)
    module, x = build(), torch.randn(shape)
    return module, x, torch.randn_like(module(x).detach()) / len(x)


@pytest.mark.parametrize("samples", [8, None], ids=["bounded", "every row"])
@pytest.mark.parametrize("name", LAYERS)
def test_measure(benchmark, name, samples):
    alone(benchmark, measured, natgrad.curvature.Kronecker(samples), *batch(*LAYERS[name]))


def test_measure_norm(benchmark):
    alone(benchmark, measured, natgrad.curvature.UnitWise(8), *batch(*NORM))


@pytest.mark.parametrize(
    "kind", [natgrad.curvature.Kronecker, natgrad.curvature.EigenKronecker], ids=["Cholesky", "eigen"]
)
@pytest.mark.parametrize("side", SIDES)
def test_invert(benchmark, side, kind):
    rows = torch.randn(2 * side, side)
    alone(benchmark, kind().factor, "A", (rows.T @ rows / len(rows)).unsqueeze(0), torch.tensor([0.1]))


@pytest.mark.parametrize("shape", [(16, 144), (64, 576), (1024, 1025)], ids=str)
def test_precondition(benchmark, shape):
    out, inner = shape
    inverses = {"A": torch.randn(1, inner, inner), "G": torch.randn(1, out, out)}
    alone(benchmark, natgrad.curvature.Kronecker().precondition, inverses, torch.randn(1, out, inner), 0.1)


@pytest.mark.parametrize("side", SIDES)
def test_pack(benchmark, side):
    alone(benchmark, pack, [torch.randn(1, side, side)], [True])


@pytest.mark.parametrize("side", SIDES)
def test_unpack(benchmark, side):
    buffer = pack([torch.randn(1, side, side)], [True])
    alone(benchmark, unpack, buffer, [(1, side, side)], [True])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "micro-cpu.json")
    out = parser.parse_args().out
    record = Record(out, "cpu")
    if record.find({"rounds": ROUNDS["rounds"]}):
        print(f"{out} is of this machine and commit already")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "told.json"
        code = pytest.main([__file__, "-q", f"--benchmark-json={path}", "--benchmark-columns=median,iqr"])
        if code:
            sys.exit(int(code))
        told = json.loads(path.read_text())["benchmarks"]
    rows = [
        {
            "name": one["name"].removeprefix("test_"),
            "median_ms": float(f"{1e3 * one['stats']['median']:.4g}"),
            "iqr_ms": float(f"{1e3 * one['stats']['iqr']:.2g}"),
        }
        for one in told
    ]
    record.add({"rounds": ROUNDS["rounds"]}, rows)


if __name__ == "__main__":
    main()
