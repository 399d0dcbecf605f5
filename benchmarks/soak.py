"""Does anything grow? Long runs with all features on, optimizers built and dropped, many side by side.

    python benchmarks/soak.py --keep             (stopped, it goes on with the case it was at)
    python benchmarks/soak.py --steps 2000       (shorter)

A step of the long run has two parts, clipping, weight decay in groups, a learning rate that falls and rises, curvature
measured when it has moved, drawn labels (where there are any), parameters without curvature, and half precision with a
GradScaler; now and then an evaluation, a checkpoint that is loaded again, a layer frozen and unfrozen, and a batch with
NaN. What is looked at: memory of the process, tensors alive, hooks on the model, and milliseconds of processor time a
step, each with the slope of a fitted line over the second half of the run.
"""

from __future__ import annotations

import argparse
import copy
import gc
import io
import math
import statistics
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from record import Record
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad

RESULTS = Path(__file__).parent / "results" / "soak.json"
LOOKS = 40
"""How often a run is looked at."""

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SPNGD": lambda model, **options: natgrad.SPNGD(model, 0.02, fisher="sampled", rescale="shrink", **options),
    "KFAC": lambda model, **options: natgrad.KFAC(model, 0.02, gather="directions", **options),
    "SENG": lambda model, **options: natgrad.SENG(model, 0.02, columns="improved", **options),
    "NLCG": lambda model, **options: natgrad.NLCG(model, 0.02, **options),
    "SPNGD, budget": lambda model, **options: natgrad.SPNGD(
        model, 0.02, refresh=natgrad.Budget(0.2, then=natgrad.Adaptive()), **options
    ),
}


class Small(nn.Module):
    """An embedding, a convolution, two kinds of norms, linear layers, and a parameter of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.batch, self.layer = nn.BatchNorm1d(8), nn.LayerNorm(8)
        self.gain = nn.Parameter(torch.ones(8))
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.relu(self.batch(self.conv(self.embed(tokens).transpose(1, 2)))).mean(2)
        return self.head(torch.tanh(self.body(self.layer(hidden) * self.gain)))


def batch(step: int, n: int = 32) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(16, (n, 6), generator=torch.Generator().manual_seed(step))
    return tokens, tokens.sum(1) % 4


def tensors_alive() -> int:
    gc.collect()
    return sum(1 for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter))


def hooks_on(model: nn.Module) -> int:
    """Hooks of a model's modules and parameters."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)
    return modules + sum(len(p._backward_hooks or ()) for p in model.parameters())


def slope(values: Sequence[float]) -> tuple[float, float]:
    """By how much a fitted line rises over all values, and the standard error of that."""
    n = len(values)
    x = [k - (n - 1) / 2 for k in range(n)]
    total = sum(k * k for k in x)
    mean = statistics.fmean(values)
    rise = sum(k * v for k, v in zip(x, values)) / total
    rest = sum((v - mean - rise * k) ** 2 for k, v in zip(x, values))
    return rise * (n - 1), math.sqrt(rest / max(n - 2, 1) / total) * (n - 1)


class LongRun:
    """A run with all features on, one step after the other."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.name, self.model = name, Small()
        groups = natgrad.decay_groups(self.model, 0.01)
        self.scaler = torch.amp.GradScaler("cpu", 2.0**10)
        self.optimizer = OPTIMIZERS[name](self.model, params=groups, max_norm=1.0, scaler=self.scaler)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(self.optimizer, 500)

    def step(self, step: int) -> float:
        """Train one step of two parts; returns the last part's loss."""
        tokens, labels = batch(step)
        for x, y in zip(tokens.chunk(2), labels.chunk(2)):
            with torch.autocast("cpu", torch.float16):
                output = self.model(x)
            loss = F.cross_entropy(output.float(), y) / 2 * (math.nan if poisoned(step) else 1.0)
            if self.name == "SPNGD":
                self.optimizer.sample(output)
            self.scaler.scale(loss).backward()
            if self.name == "NLCG":
                self.optimizer.report(loss)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.schedule.step()
        return float(loss.detach())

    def between(self, step: int) -> None:
        """What happens between steps now and then: evaluations, checkpoints, a layer that is frozen and unfrozen."""
        if step % 250 == 125:
            self.model.eval()
            with torch.no_grad():
                self.model(batch(step)[0])
            self.model.train()
        if step % 500 == 250:
            buffer = io.BytesIO()
            torch.save(self.optimizer.state_dict(), buffer)
            buffer.seek(0)
            self.optimizer.load_state_dict(torch.load(buffer, weights_only=True))
        if step % 1000 in (600, 700):
            self.model.body.requires_grad_(step % 1000 == 700)


def poisoned(step: int) -> bool:
    """Whether a step's batch has NaN."""
    return step % 997 == 400


def long_run(name: str, steps: int) -> dict[str, Any]:
    """Train so many steps; what was seen at each look."""
    run, process = LongRun(name), psutil.Process()
    every, seen = max(steps // LOOKS, 1), []
    spent, losses = 0.0, []
    for step in range(steps):
        begin = time.process_time()
        loss = run.step(step)
        spent += time.process_time() - begin
        losses += [] if poisoned(step) else [loss]
        run.between(step)
        if step % every == every - 1:
            look = {"step": step + 1, "ms": 1000 * spent / every, "rss_mib": process.memory_info().rss / 2**20}
            seen.append(
                {**look, "tensors": tensors_alive(), "hooks": hooks_on(run.model), "loss": statistics.fmean(losses)}
            )
            spent, losses = 0.0, []
    half = seen[len(seen) // 2 :]
    rises = {key: slope([one[key] for one in half]) for key in ("ms", "rss_mib", "tensors", "hooks")}
    told = {key: {"rise": rise, "error": error} for key, (rise, error) in rises.items()}
    found = {"rises": told, "skipped": run.optimizer.skipped, "retries": run.optimizer.engine.retries}
    return {**found, "dropped": run.optimizer.engine.dropped, "looks": seen}


def built_and_dropped(times: int) -> dict[str, Any]:
    """Build optimizers of all kinds, take two steps with each, and let go; what is left of them."""
    process, kinds = psutil.Process(), list(OPTIMIZERS.values())
    torch.manual_seed(0)
    model = Small()
    clean = hooks_on(model)
    found, refs = [], []
    for k in range(times):
        optimizer = kinds[k % len(kinds)](model)
        for step in range(2):
            output = model(batch(step)[0])
            if optimizer.engine.sampled:
                optimizer.sample(output)
            F.cross_entropy(output, batch(step)[1]).backward()
            optimizer.step()
            optimizer.zero_grad()
        refs.append(weakref.ref(optimizer))
        del optimizer
        if k % max(times // LOOKS, 1) == 0:
            found.append({"tensors": tensors_alive(), "rss_mib": process.memory_info().rss / 2**20})
    gc.collect()
    left = sum(ref() is not None for ref in refs)
    half = found[len(found) // 2 :]
    rises = {key: slope([one[key] for one in half]) for key in ("tensors", "rss_mib")}
    told = {key: {"rise": rise, "error": error} for key, (rise, error) in rises.items()}
    return {"built": times, "left": left, "hooks": hooks_on(model) - clean, "rises": told}


def side_by_side(count: int, steps: int = 6) -> dict[str, Any]:
    """Optimizers on one layer each of a model, beside one optimizer for all layers: the same weights."""
    torch.manual_seed(0)
    whole = nn.Sequential(*[part for _ in range(count) for part in (nn.Linear(4, 4), nn.Tanh())])
    parts = copy.deepcopy(whole)
    options: dict[str, Any] = {"length": natgrad.plain, "refresh": 2, "rows_per_dim": None, "damping": 0.1}
    one = natgrad.SPNGD(whole, 0.01, **options)
    many = [natgrad.SPNGD(parts, 0.01, params=layer.parameters(), **options) for layer in parts[::2]]  # type: ignore[attr-defined]
    for step in range(steps):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        for model, optimizers in ((whole, [one]), (parts, many)):
            model(x).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
    apart = max(float((p - q).detach().abs().max()) for p, q in zip(whole.parameters(), parts.parameters()))
    measured = sum(own.preconditioned.layers for own in many)
    del one, many, optimizer, optimizers
    gc.collect()
    return {"optimizers": count, "apart": apart, "preconditioned": measured, "hooks": hooks_on(parts) + hooks_on(whole)}


def length(name: str, steps: int) -> int:
    """The first one runs longest."""
    return steps if name == "SPNGD" else steps // 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--keep", action="store_true", help=f"write {RESULTS.name}")
    told = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", natgrad.NatgradWarning)
    record = Record(RESULTS, "cpu", steps=told.steps)
    cases: list[tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = [
        ({"case": "built and dropped"}, lambda: built_and_dropped(max(told.steps // 20, 1))),
        ({"case": "side by side"}, lambda: side_by_side(100)),
        *(({"case": "long run", "optimizer": n}, lambda n=n: long_run(n, length(n, told.steps))) for n in OPTIMIZERS),
    ]
    for case, measure in cases:
        if told.keep and record.find(case) is not None:
            continue
        found = measure()
        print(case, {key: value for key, value in found.items() if key != "looks"}, flush=True)
        if told.keep:
            record.add(case, [found])


if __name__ == "__main__":
    main()
