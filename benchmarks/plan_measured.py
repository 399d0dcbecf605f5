"""Predicted against measured steps on this machine: ResNet-20, 128 images a step, on 1, 2 and 4 gloo ranks.

    python benchmarks/plan_measured.py          (10 minutes; writes results/plan-measured.json)

First `natgrad plan --calibrate` measures the machine, then every number of ranks takes its steps, one of each
optimizer in every round, and the plan predicts them from that file. Measured are the clock (the slowest rank's, the
least and the median over rounds) and the processor: the longest rank's seconds, or where ranks share cores all seconds
over the cores. Where others use the same cores, the clock of even the best round may be too long; the processor's
seconds leave out their time, and what ranks wait for messages.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import git, machine
from torch.nn.functional import cross_entropy

from natgrad.parallel import World, join, leave
from natgrad_lab.models import CifarResNet
from natgrad_lab.plan.machine import Machine
from natgrad_lab.plan.machines import named
from natgrad_lab.plan.scaling import Network, Planner
from natgrad_lab.train.optimizers import KFac, Nlcg, Seng, Settings, Sgd, SpNgd

BATCH, ROUNDS, RANKS, CORES = 128, 12, (1, 2, 4), 2
REFRESH = 2  # of those that measure: every other step
CONTENDERS: dict[str, Settings] = {
    "SGD": Sgd(),
    "SP-NGD": SpNgd(lr=1e-3, refresh=REFRESH),
    "SP-NGD, every row": SpNgd(lr=1e-3, refresh=REFRESH, rows_per_dim=None),
    "K-FAC": KFac(lr=1e-3, refresh=REFRESH),
    "SENG": Seng(refresh=REFRESH),
    "NLCG": Nlcg(lr=1e-3),
}
NETWORK = CifarResNet(depth=20)
RESULTS = Path(__file__).parent / "results" / "plan-measured.json"


class Contender:
    """A model and its optimizer on one rank."""

    def __init__(self, settings: Settings, world: World):
        torch.manual_seed(0)
        self.settings, self.world = settings, world
        self.model = NETWORK.build((3, 32, 32), 100)
        self.optimizer = settings.build(self.model, world)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
        """Seconds of one step on the clock and of the processor."""
        self.world.sum([torch.zeros(1)])  # all begin together
        wall, host = time.perf_counter(), time.process_time()
        output = self.model(images)
        loss = cross_entropy(output, labels)
        loss.backward()
        self.settings.take(self.optimizer, loss.detach(), lambda: self.model(images))
        self.optimizer.zero_grad()
        return time.perf_counter() - wall, time.process_time() - host


def work(world: World, out: Path) -> None:
    """Take all steps on this rank; rank 0 writes what they took."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator).chunk(world.size)[world.rank]
    labels = torch.randint(100, (BATCH,), generator=generator).chunk(world.size)[world.rank]
    built = {name: Contender(settings, world) for name, settings in CONTENDERS.items()}
    taken: dict[str, dict[str, list]] = {name: {"fresh": [], "stale": []} for name in built}
    for turn in range(2 * ROUNDS + 2):
        for name, contender in built.items():
            wall, host = contender.step(images, labels)
            most, total = torch.tensor([wall, host]), torch.tensor([host])
            world.max([most])
            world.sum([total])
            if turn >= 2:
                kind = "stale" if turn % REFRESH else "fresh"
                taken[name][kind].append([float(most[0]), max(float(most[1]), float(total) / CORES)])
    if world.rank == 0:
        out.write_text(json.dumps(taken))


def measure(ranks: int) -> dict[str, dict[str, dict[str, float]]]:
    """Clock and processor of every optimizer on so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "taken.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        command = [sys.executable, *launcher, __file__, "--rank-writes", str(out)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        taken = json.loads(out.read_text())
    return {name: {kind: said(pairs) for kind, pairs in kinds.items()} for name, kinds in taken.items()}


def said(pairs: list[list[float]]) -> dict[str, float]:
    walls, hosts = zip(*pairs)
    quartile = statistics.quantiles(hosts, n=4)[0]
    return {"clock, least": min(walls), "clock, median": statistics.median(walls), "processor": quartile}


def calibrate() -> Machine:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "machine.json"
        began = time.perf_counter()
        command = [sys.executable, "-m", "natgrad_lab", "plan", "--calibrate", str(path), "--ranks", "2"]
        subprocess.run(command, check=True)
        print(f"calibrated in {time.perf_counter() - began:.0f} s")
        return named(str(path))


def predict(planner: Planner, settings: Settings, ranks: int) -> dict[str, dict[str, Any]]:
    account = planner.account(settings, ranks, BATCH)
    found = {}
    for kind in ("stale", "fresh"):
        stages = account.stages(kind == "fresh")[0]
        waits = stages["messages"] + stages["gather"] if ranks > 1 else 0.0
        found[kind] = {"seconds": sum(stages.values()), "messages": waits, "stages": stages}
    return found


def compare(predicted: dict[str, Any], taken: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    rows = []
    for name in CONTENDERS:
        for kind in ("stale", "fresh"):
            if kind == "fresh" and name in ("SGD", "NLCG"):
                continue
            ours, theirs = predicted[name][kind], taken[name][kind]
            row = {"optimizer": name, "ranks": ranks, "kind": kind, "predicted": ours["seconds"], **theirs}
            row["over processor"] = ours["seconds"] / theirs["processor"] - 1
            row["over clock"] = ours["seconds"] / theirs["clock, least"] - 1
            rows.append({**row, "stages": ours["stages"]})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for r in rows:
        times = [1e3 * r[k] for k in ("predicted", "processor", "clock, least", "clock, median")]
        shown = "".join(f"{t:10.0f}" for t in times)
        ratios = f"{r['over processor']:+10.0%}{r['over clock']:+10.0%}"
        print(f"{r['ranks']:3} {r['optimizer']:20}{r['kind']:6}{shown}{ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank-writes", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--machine", help="a calibrated file, instead of calibrating beside the measurement")
    options = parser.parse_args()
    if options.rank_writes:
        work(join(), options.rank_writes)
        leave()
        return
    rows: list[dict[str, Any]] = []
    head = "".join(f"{word:>10}" for word in ("predicted", "processor", "clock", "median", "p/proc", "p/clock"))
    print(f"{'':30}{head}   (ms)")
    machines = []
    for ranks in RANKS:
        load = os.getloadavg()[0]
        found = named(options.machine) if options.machine else calibrate()
        planner = Planner(Network("ResNet-20", lambda: NETWORK.build((3, 32, 32), 100), (3, 32, 32)), found)
        taken = measure(ranks)
        predicted = {name: predict(planner, settings, ranks) for name, settings in CONTENDERS.items()}
        more = compare(predicted, taken, ranks)
        show(more)
        rows += more
        machines.append({"ranks": ranks, "load before": load, "load after": os.getloadavg()[0], **found.described()})
    errors = [abs(r["over processor"]) for r in rows]
    near = sum(e <= 0.3 for e in errors)
    print(f"within 30 % of the processor's seconds: {near} of {len(rows)}, worst {max(errors):.0%}")
    about = {"machine": machine("cpu"), "torch": torch.__version__, "commit": git("rev-parse", "--short", "HEAD")}
    RESULTS.write_text(json.dumps({**about, "rows": rows, "calibrations": machines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
