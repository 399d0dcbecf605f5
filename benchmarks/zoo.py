"""What natgrad does with models as people have them: shares of weights with curvature, exactness, ten steps.

    python benchmarks/zoo.py [--only NAME ...] [--out benchmarks/results/zoo.json] [--table]

For each configuration of zoo_models.py whose packages are there, in double precision: the share of trainable weights
that have a curvature of their own before and after the first step, whether the layers with curvature pass the checksum,
how far SENG's rows are from autograd's gradients of single samples, and the loss before and after ten steps of each
optimizer. `--table` prints the rows of the documentation from the results.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from zoo_models import ALL, N, Zoo, there

import natgrad
from natgrad.curvature.per_sample import explicit
from natgrad.layers import UncurvedParameter

OPTIMIZERS = {
    "SPNGD": lambda m: natgrad.SPNGD(m, lr=0.01),
    "KFAC": lambda m: natgrad.KFAC(m, lr=0.02),
    "SENG": lambda m: natgrad.SENG(m, lr=0.01),
    "NLCG": lambda m: natgrad.NLCG(m, lr=0.05),
}
STEPS = 10
RESULTS = Path(__file__).parent / "results" / "zoo.json"


def seeded(zoo: Zoo) -> torch.nn.Module:
    torch.manual_seed(0)
    return zoo.build()


def shares(zoo: Zoo) -> dict[str, Any]:
    """The share of weights with curvature, before and after a step of SPNGD, and why the others have none."""
    model = seeded(zoo).double()
    opt = natgrad.SPNGD(model, lr=1e-30, rows_per_dim=None)
    before = opt.coverage().share
    zoo.loss(model, slice(None)).backward()
    opt.step()
    rows = opt.coverage()
    astray = [row.layer for row in rows if "do not account" in row.why]
    return {"before": before, "share": rows.share, "why": rows.reasons(), "checksum": not astray, "astray": astray}


def errors(zoo: Zoo) -> dict[str, Any]:
    """The largest relative error of SENG's rows against gradients of single samples, and of their sums.

    Layers whose rows cannot be told apart, as those of experts, are not among them.
    """
    model = seeded(zoo).double().eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():  # away from zero, where gradients vanish and rectifiers have no derivative
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64), alpha=0.02)
    opt = natgrad.SENG(model, lr=1e-30, samples=None, sketch=None, refresh=1, momentum=0.0)
    zoo.loss(model, slice(None)).backward()
    opt.step()
    opt.engine.capture.disarm()
    if opt.assumed is None:  # nothing was measured
        return {"error": 0.0, "checked": 0, "wrong": []}
    means = opt.assumed.predictions
    trained = {id(p): k for k, p in enumerate(q for q in model.parameters() if q.requires_grad)}
    alone = []
    for k in range(N):
        model.zero_grad()
        zoo.loss(model, slice(k, k + 1)).backward()
        own = [p for p in model.parameters() if p.requires_grad]
        alone.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in own])
    scale = max(float(g.norm()) for own in alone for g in own)  # what is far below it is rounding
    largest, checked, wrong = 0.0, 0, []
    for cell in opt.cells:
        if isinstance(cell.layer, UncurvedParameter) or not cell.ready:
            continue
        rows = explicit(cell.kept(), cell.layer.shape)
        if len(rows) != N:
            wrong.append(cell.name)
            continue
        for place, parameter in enumerate(cell.layer.parameters):
            found = torch.stack([cell.layer.unpack(row)[place].reshape(parameter.shape) for row in rows])
            true = torch.stack([alone[k][trained[id(parameter)]] for k in range(N)])
            if not true.any():
                continue
            error = float((found * (N / means) ** 0.5 - true).norm() / max(float(true.norm()), 1e-8 * scale))
            checked += 1
            largest = max(largest, error)
            if error > 1e-6:
                wrong.append(cell.name)
    return {"error": largest, "checked": checked, "wrong": wrong}


def learned(zoo: Zoo, name: str) -> tuple[float, float]:
    """The loss before and after ten steps, in single precision."""
    model = seeded(zoo).train()
    opt = OPTIMIZERS[name](model)
    losses = []
    for _ in range(STEPS):
        loss = zoo.loss(model, slice(None))
        opt.zero_grad()
        loss.backward()
        opt.step(**({"loss": loss.detach()} if name == "NLCG" else {}))
        losses.append(float(loss))
    return losses[0], float(zoo.loss(model, slice(None)))


def measured(zoo: Zoo) -> dict[str, Any]:
    """All that a row of the table says."""
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {**shares(zoo), **errors(zoo)}
        found["losses"] = {name: learned(zoo, name) for name in OPTIMIZERS}
    return {**found, "seconds": round(time.perf_counter() - began, 1)}


def table(results: dict[str, Any]) -> str:
    """The results as rows of Markdown."""
    lines = [
        "| model | own curvature | checksum | parameters checked | largest error | " + " | ".join(OPTIMIZERS) + " |",
        "| --- | ---: | --- | ---: | ---: | " + " | ".join("---:" for _ in OPTIMIZERS) + " |",
    ]
    for name, row in results["models"].items():
        if "failed" in row:
            lines.append(f"| {name} | failed: {row['failed']} |")
            continue
        losses = " | ".join(f"{a:.2f} to {b:.2f}" for a, b in (row["losses"][k] for k in OPTIMIZERS))
        agrees = "agrees" if row["checksum"] else f"{len(row['astray'])} withdrawn"
        checked = f"{row['checked']}" + (f", {len(row['wrong'])} wrong" if row["wrong"] else "")
        lines.append(f"| {name} | {row['share']:.1%} | {agrees} | {checked} | {row['error']:.0e} | {losses} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args(arguments)
    if given.table:
        print(table(json.loads((given.out or RESULTS).read_text())))
        return 0
    torch.set_num_threads(1)
    results: dict[str, Any] = {"command": "python benchmarks/zoo.py", "torch": torch.__version__, "models": {}}
    for name, zoo in ALL.items():
        if (given.only and name not in given.only) or not all(map(there, zoo.needs)):
            continue
        try:
            row = measured(zoo)
        except Exception as error:  # the table says so
            row = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
        results["models"][name] = row
        print(name, json.dumps(row), flush=True)
        if given.out:
            given.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
