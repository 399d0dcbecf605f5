"""What a step really changes: the curvature along SP-NGD's steps and the outputs' change, beside what was predicted.

    python benchmarks/change.py --data data/cifar100    (15 minutes on one core)
    python benchmarks/change.py --show                  (the table of the committed results)

After every step the same batch is taken once more, in training mode, without a trace: its gradient g' gives the
curvature along the step s, s . (g' - g), and its outputs twice the KL divergence from those before. Both are quoted
over the change that was predicted, lr^2 d^T F d. Where the schedule has brought a step below a tenth of the permitted
length it says nothing of the bound and is left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import Record
from torch import Tensor, nn
from torch.nn import functional as F

from natgrad.optim import SecondOrder
from natgrad.parallel import World
from natgrad_lab.compare.tasks import find_task
from natgrad_lab.data import Splits
from natgrad_lab.schedules import Cosine
from natgrad_lab.train.loop import Job, logits_of, parts, prepare
from natgrad_lab.train.malloc import keep_freed_memory
from natgrad_lab.train.optimizers import SpNgd

RESULTS = Path(__file__).parent / "results" / "change.json"
PREDICTED = SpNgd(lr=0.1, length="kl_clip")
CASES: dict[str, tuple[str, int, int, SpNgd]] = {
    "ResNet-8, 5,000 images, predicted .01": ("cifar100-16", 5000, 40, PREDICTED),
    "ResNet-8, 5,000 images, predicted .1": ("cifar100-16", 5000, 40, replace(PREDICTED, largest_change=0.1)),
    "ResNet-8, 5,000 images, measured": ("cifar100-16", 5000, 40, SpNgd(lr=0.1)),
    "ResNet-8, 500 images, predicted .01": ("cifar100-16", 500, 100, PREDICTED),
    "ResNet-8, 500 images, measured": ("cifar100-16", 500, 100, SpNgd(lr=0.1)),
    "transformer, 64 windows, predicted .01": ("charlm", 64, 100, PREDICTED),
    "transformer, 64 windows, measured": ("charlm", 64, 100, SpNgd(lr=0.1)),
    "transformer, 256 windows, predicted .01": ("charlm", 256, 60, PREDICTED),
    "transformer, 256 windows, measured": ("charlm", 256, 60, SpNgd(lr=0.1)),
}
"""By name: the comparison's task, samples in a batch, steps, the optimizer."""


def rows(job: Job) -> Iterator[dict[str, float]]:
    """One step after another, each with what it changed."""
    optimizer, names = job.optimizer, [p for p in job.model.parameters() if p.requires_grad]
    assert isinstance(optimizer, SecondOrder)
    for number, batch in zip(range(job.steps), job.sampler.stream(0)):
        job.pace.set(job.progress(number))
        ((inputs, labels),) = parts(job, batch, torch.Generator().manual_seed(number))
        loss = cross_entropy(job.model(inputs), labels)
        loss.backward()
        before, weights = [p.grad.clone() for p in names if p.grad is not None], [p.detach().clone() for p in names]
        with untouched(job.model), torch.no_grad():
            then = logits_of(job.model(inputs)).log_softmax(1)
        optimizer.step()
        optimizer.zero_grad()
        step = [p.detach() - w for p, w in zip(names, weights)]
        with untouched(job.model):
            output = job.model(inputs)
            after = torch.autograd.grad(cross_entropy(output, labels), names)
        now = logits_of(output.detach()).log_softmax(1)
        told = optimizer.last_step
        assert told is not None
        yield {
            "loss": loss.item(),
            "predicted": told.change,
            "bound": told.bound,
            "shown": sum(dot(s, b - a) for s, a, b in zip(step, before, after)),
            "divergence": 2 * float((then.exp() * (then - now)).sum(1).mean()),
        }


def cross_entropy(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(output), labels.flatten())


def dot(a: Tensor, b: Tensor) -> float:
    return float(torch.sum(a.double() * b.double()))


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put the running statistics of normalisations back."""
    kept = [b.clone() for b in model.buffers()]
    yield
    for buffer, value in zip(model.buffers(), kept):
        buffer.copy_(value)


def job_of(task_name: str, batch: int, steps: int, settings: SpNgd, splits: Splits) -> Job:
    recipe = replace(
        find_task(task_name).recipe,
        optimizer=settings,
        schedule=Cosine(),
        batch=batch,
        steps=steps,
        micro_batch=None,
        seed=100,
    )
    return prepare(recipe, World(), splits)


def table(content: dict[str, Any]) -> str:
    """5 %, 50 % and 95 % of the steps of each case; the loss at the end, a mean over five steps."""
    head = ["case", "shown / predicted", "2 KL / predicted", "2 KL", "training loss at the end"]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---', *['---:'] * (len(head) - 1)])} |"]
    for case in content["cases"]:
        told = case["rows"]
        whole = [r for r in told if r["predicted"] > 0.01 * r["bound"]]
        shown = [r["shown"] / r["predicted"] for r in whole]
        divergence = [r["divergence"] / r["predicted"] for r in whole]
        cells = [spread(shown, 0), spread(divergence, 0), spread([r["divergence"] for r in whole], 2)]
        end = sum(r["loss"] for r in told[-5:]) / 5
        lines.append(f"| {case['case']} | {' | '.join(cells)} | {end:.3f} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    low, middle, high = np.quantile(values, (0.05, 0.5, 0.95))
    return f"{low:.{digits}f} .. {middle:.{digits}f} .. {high:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/cifar100", help="folder with CIFAR-100's parquet files")
    parser.add_argument("--show", action="store_true", help="print the table of the results")
    told = parser.parse_args()
    keep_freed_memory()
    if not told.show:
        record = Record(RESULTS, "cpu")
        for name, (task_name, batch, steps, settings) in CASES.items():
            case = {"case": name, "task": task_name, "batch": batch, "steps": steps, "seed": 100}
            if record.find(case) is None:
                task = find_task(task_name)
                task = task.located(told.data) if task_name.startswith("cifar") else task
                record.add(case, list(rows(job_of(task_name, batch, steps, settings, task.recipe.data.load()))))
                print(name, flush=True)
    print(table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
