"""How many steps SENG needs beside tuned SGD and Adam: digits in batches of 1,024 of 1,437 training images.

    python benchmarks/seng.py            (one thread, some 15 minutes; stopped, it goes on where it was)
    python benchmarks/seng.py --show     (the tables of the results as they are)

Two small networks, constant learning rates, no weight decay, no augmentation. Counted are the steps until the loss of
all training images is down at 0.3, 0.1 and 0.03. Every method has 30 settings, tried on two seeds; the one with the
fewest steps to 0.1 (a run that never gets there counts as 150) is judged once on five other seeds.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import natgrad
from natgrad.parallel import World
from natgrad_lab.data import Digits, Sampler
from natgrad_lab.models import Mlp
from natgrad_lab.models.architecture import he_normal
from natgrad_lab.train import environment
from natgrad_lab.train.log import write_json

RESULTS = Path(__file__).parent / "results"
TARGETS = (0.3, 0.1, 0.03)
JUDGED = 1  # which target a setting is chosen by
BATCH, LIMIT = 1024, 150
HOPELESS = (50, 1.5)  # steps after which a run with such a loss is stopped, as one that never gets there
TUNING, FRESH = (100, 101), (1, 2, 3, 4, 5)
TRIALS = 30

Setting = dict[str, Any]
Build = Callable[..., torch.optim.Optimizer]


def mlp() -> nn.Module:
    """64-128-64-10, 17,226 weights."""
    return Mlp((128, 64)).build((1, 8, 8), 10)


def cnn() -> nn.Module:
    """Three 3x3 convolutions of 8, 16 and 32 channels and a linear layer, 7,178 weights, no normalisation."""
    layers: list[nn.Module] = []
    for inputs, outputs, pool in ((1, 8, False), (8, 16, True), (16, 32, True)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), *([nn.MaxPool2d(2)] if pool else [])]
    return he_normal(nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10)))


def grid(**choices: Sequence[Any]) -> list[Setting]:
    """Every combination."""
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


def sgd(model: nn.Module, **setting: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **setting)


def adam(model: nn.Module, **setting: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), **setting)


def seng(model: nn.Module, columns: Any = "empirical", **setting: Any) -> torch.optim.Optimizer:
    """SENG as its authors have it; `ratio` is the learning rate over the damping."""
    ratio = setting.pop("ratio")
    return natgrad.SENG(model, ratio * setting["damping"], columns=columns, length=natgrad.plain, **setting)


improved = functools.partial(seng, columns="improved")
MODELS = {"MLP": mlp, "CNN": cnn}
METHODS: dict[str, tuple[Build, list[Setting]]] = {
    "SGD": (sgd, grid(lr=(0.025, 0.05, 0.1, 0.2, 0.4), momentum=(0.7, 0.8, 0.9), nesterov=(False, True))),
    "Adam": (
        adam,
        grid(
            lr=(0.003, 0.006, 0.01, 0.02, 0.03, 0.06),
            betas=((0.6, 0.99), (0.7, 0.99), (0.8, 0.99), (0.9, 0.99), (0.9, 0.999)),
        ),
    ),
    "SENG": (seng, grid(damping=(0.03, 0.1, 0.3, 1.0, 3.0), ratio=(0.5, 1.0, 2.0), momentum=(0.7, 0.8), refresh=(1,))),
    "SENG, improved": (
        improved,
        grid(damping=(0.1, 0.3, 1.0), ratio=(1.0, 2.0, 3.5, 6.0, 10.0), momentum=(0.5, 0.7), refresh=(1,)),
    ),
}


@functools.cache
def images() -> tuple[Tensor, Tensor]:
    """All training images and labels."""
    train = Digits().load().train
    return train.batch(torch.arange(len(train)))


def steps_to(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, targets: Sequence[float]) -> list:
    """Steps until each target is reached, None for never; ends with the last one."""
    inputs, labels = images()
    reached: list[int | None] = [None] * len(targets)
    batches = Sampler(len(labels), BATCH, seed, drop_last=True).stream()
    for step, batch in zip(range(1, LIMIT + 1), batches):
        cross_entropy(model(inputs[batch.index]), labels[batch.index]).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            loss = float(cross_entropy(model(inputs), labels))
        reached = [step if r is None and loss <= t else r for r, t in zip(reached, targets)]
        if None not in reached or loss != loss or (step >= HOPELESS[0] and loss > HOPELESS[1]):
            break
    return reached


@dataclass
class Trials:
    """Runs, remembered in a folder."""

    folder: Path

    def __call__(self, name: str, method: str, setting: Setting, seed: int, targets: Sequence[float]) -> list:
        told = {"model": name, "method": method, **setting, "seed": seed, "targets": targets, "batch": BATCH}
        path = self.folder / f"{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]}.json"
        if not path.exists():
            torch.manual_seed(seed)
            model = MODELS[name]()
            write_json(path, steps_to(model, METHODS[method][0](model, **setting), seed, targets))
        return json.loads(path.read_text())


def merit(tried: Iterable[list]) -> float:
    """The mean of the steps to the target that is judged by."""
    return statistics.fmean(LIMIT if run[0] is None else run[0] for run in tried)


def study(trials: Trials, name: str, method: str) -> dict[str, Any]:
    """Choose a setting on the tuning seeds, judge it on the fresh ones."""
    settings = METHODS[method][1]
    assert len(settings) == TRIALS
    judged = [TARGETS[JUDGED]]
    tried = [merit([trials(name, method, s, seed, judged) for seed in TUNING]) for s in settings]
    chosen = settings[tried.index(min(tried))]
    runs = [trials(name, method, chosen, seed, TARGETS) for seed in FRESH]
    return {"method": method, "chosen": chosen, "tuning": [round(t, 1) for t in tried], "steps": runs}


def middle(runs: list[list], target: int) -> float:
    """The median over seeds, infinity where most never get there."""
    return statistics.median(float("inf") if run[target] is None else run[target] for run in runs)


def table(rows: list[dict[str, Any]]) -> str:
    """Medians (and ranges) over the fresh seeds, and the ratio to SGD's at the target that was tuned for."""
    heads = [f"to {t}" for t in TARGETS]
    lines = [f"| method | {' | '.join(heads)} | over SGD's, to {TARGETS[JUDGED]} | chosen of {TRIALS} |"]
    lines.append("| --- |" + " --- |" * (len(heads) + 2))
    base = middle(rows[0]["steps"], JUDGED)
    for row in rows:
        cells = [shown([run[k] for run in row["steps"]]) for k in range(len(TARGETS))]
        chosen = ", ".join(f"{k} {v}" for k, v in row["chosen"].items())
        lines.append(
            f"| {row['method']} | {' | '.join(cells)} | {middle(row['steps'], JUDGED) / base:.2f} | {chosen} |"
        )
    return "\n".join(lines)


def shown(steps: list) -> str:
    """Median (least-most)."""
    counts = sorted(float("inf") if s is None else s for s in steps)
    least, mid, most = ("never" if c == float("inf") else f"{c:g}" for c in (counts[0], *map(float, counts[2::2])))
    return f"{mid} ({least}-{most})"


def lines(result: dict[str, Any]) -> str:
    """JSON with a line for each method."""
    tasks = [
        f'  "{name}": [\n   ' + ",\n   ".join(map(json.dumps, rows)) + "\n  ]" for name, rows in result["tasks"].items()
    ]
    heads = [f' "{key}": {json.dumps(value)}' for key, value in result.items() if key != "tasks"]
    return "{\n" + ",\n".join([*heads, ' "tasks": {\n' + ",\n".join(tasks) + "\n }"]) + "\n}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=Path, default=Path("runs") / "seng", help="where runs are remembered")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print the tables of the results in --out, run nothing")
    told = parser.parse_args()
    torch.set_num_threads(1)
    path = told.out / "seng.json"
    if not told.show:
        about = environment.describe(World(), torch.device("cpu"))
        result: dict[str, Any] = {"about": {**about, "command": "python benchmarks/seng.py"}}
        result |= {"targets": TARGETS, "tuning_seeds": TUNING, "seeds": FRESH, "limit": LIMIT, "tasks": {}}
        for name in MODELS:
            rows = result["tasks"][name] = []
            for method in METHODS:
                rows.append(study(Trials(told.trials), name, method))
                print(name, rows[-1]["method"], rows[-1]["chosen"], rows[-1]["steps"], flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines(result) + "\n")
    for name, rows in json.loads(path.read_text())["tasks"].items():
        print(f"\n### {name}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
