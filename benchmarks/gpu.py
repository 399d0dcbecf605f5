"""One command for a rented GPU: is natgrad right there, what does a step cost, where does the time go, does it learn?

    python benchmarks/gpu.py                         (at most 8 minutes on one H100 or H200)
    python benchmarks/gpu.py --data data/cifar100    (with the images to learn from)
    python benchmarks/gpu.py --dry                   (the same code on the CPU in tiny sizes, half a minute)

Stages come in the order of their worth, each is told how much time it has, and every figure is on disk as soon as it is
known: a second start goes on where the first one ended. What fails is written down and the rest goes on; the exit code
is 1 if a check was not passed. Stages:

    small     one small problem, all optimizers: GPU and CPU agree, with and without a CUDA graph
    steps     every optimizer beside SGD(fused), AdamW(fused) and Muon; ResNet-50 and a transformer of 124M weights
    trace     a plain step and one with all statistics stale: kernels, waits, pauses; the traces lie beside the results
    tests     the tests marked `gpu`
    training  CIFAR-100 in batches of 16,384, for as many epochs as fit into the rest
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from gpu_contenders import GPT, KINDS, RESNET, SMALL_GPT, SMALL_RESNET, Contender, Network, contenders, takes
from gpu_learn import Size, learn
from gpu_results import Results
from gpu_steps import Effort, OutOfTimeError, Runner, figures, free, smaller
from gpu_trace import INSIDE, WHOLE, trace
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import natgrad
from natgrad_lab.data import Cifar100

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 8.0
LEAST = 8.0  # seconds that are worth beginning a stage with
GRACE = 90.0  # seconds beyond its time after which a hung run is ended, with a traceback
REFUSALS = (ValueError, TypeError, NotImplementedError)  # by which an optimizer says that it has no such variant
AGREE = 1e-8  # relative, in float64
TRACED = ("SGD(fused)", "SPNGD, plain", "SPNGD, plain, CUDA graph", "SPNGD, all stale", "NLCG, plain")


class DeviceLostError(Exception):
    """Nothing works on the device any more in this process."""


@dataclass
class Run:
    """What all stages know."""

    results: Results
    device: torch.device
    end: float
    """When the time is over, on the monotonic clock."""
    effort: Effort
    dry: bool = False
    seed: int = 0
    data: str = ""
    left: list[str] = field(default_factory=list)
    """What there was no time for."""


@dataclass(frozen=True)
class Stage:
    """One case of the results. `most`: seconds that it takes at most of `MINUTES`; `work` is told its own deadline."""

    name: str
    most: float
    work: Callable[[Run, dict[str, Any], float], None]
    settings: dict[str, Any] = field(default_factory=dict)


def failure(error: BaseException) -> str:
    """A failure in one line."""
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0] if words else ''}"


def survive(run: Run, case: dict[str, Any], name: str, error: Exception) -> None:
    """Write down a failure and see whether the device still works.

    Raises:
        DeviceLostError: it does not.

    """
    traceback.print_exception(error)
    run.results.check(case, f"{name} runs", False, failure(error))
    try:
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
            torch.ones(1, device=run.device).add_(1).item()
    except Exception as lost:
        raise DeviceLostError(name) from lost


# --- small ---


def small_problem(name: str, device: torch.device, **options: Any) -> Tensor:
    """The weights after six steps in float64 that draw nothing at random."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 4, 3, stride=2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(36, 5)).double()
    x, y = torch.randn(6, 32, 3, 8, 8, dtype=torch.float64), torch.randint(5, (6, 32))
    model, x, y = model.to(device), x.to(device), y.to(device)
    if name != "NLCG":
        rows = "samples" if name == "SENG" else "rows_per_dim"
        options = {"damping": 0.1, "refresh": 2, rows: None, **options}
    if name == "SENG":
        options["sketch"] = None
    optimizer = getattr(natgrad, name)(model, lr=0.02, **options)
    for images, labels in zip(x, y):
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step(**({"loss": loss.detach()} if name == "NLCG" else {}))
    return torch.cat([p.detach().flatten() for p in model.parameters()]).cpu()


def distance(own: Tensor, other: Tensor) -> float:
    """|own - other| / |other|."""
    return float((own - other).norm() / other.norm())


def of_graph(run: Run, case: dict[str, Any], name: str, plain: Tensor) -> float | str:
    """How far the steps of a CUDA graph lead from those without; the reason where an optimizer refuses one."""
    try:
        found = distance(small_problem(name, run.device, graph=True), plain)
    except REFUSALS as error:
        return f"refused: {failure(error)}"
    run.results.check(case, f"{name} takes the same steps as a graph", found < AGREE, f"relative distance {found:.1e}")
    return found


def small(run: Run, case: dict[str, Any], deadline: float) -> None:
    """GPU and CPU take the same steps; so do a CUDA graph and its operations one by one."""
    done = {row["name"] for row in case["rows"]}
    for name in (name for name in KINDS if name not in done):
        row: dict[str, Any] = {"name": name}
        try:
            here = small_problem(name, run.device)
            row["from_cpu"] = distance(here, small_problem(name, torch.device("cpu")))
            told = f"relative distance {row['from_cpu']:.1e}"
            run.results.check(case, f"{name} takes the steps of a CPU", row["from_cpu"] < AGREE, told)
            if takes(getattr(natgrad, name), "graph") and run.device.type == "cuda":
                row["from_graph"] = of_graph(run, case, name, here)
        except Exception as error:
            run.results.row(case, {**row, "failed": failure(error)})
            survive(run, case, name, error)
        else:
            run.results.row(case, row)


# --- steps ---


def steps(network: Network, size: int) -> Callable[[Run, dict[str, Any], float], None]:
    def work(run: Run, case: dict[str, Any], deadline: float) -> None:
        done = {row["name"] for row in case["rows"] if "absent" not in row}
        wanted = [contender for contender in contenders(run.device) if contender.name not in done]
        for k, contender in enumerate(wanted):
            if contender.absent:
                run.results.row(case, {"name": contender.name, "absent": contender.absent})
                continue
            able = sum(not other.absent for other in wanted[k:])
            now = time.monotonic()
            if now > min(deadline, run.end):
                run.left.append(f"{case['case']}: {contender.name}")
                continue
            slot = now + (deadline - now) / able
            row = measured(run, case, network, contender, size, slot)
            if row is not None:
                run.results.row(case, row)
                told = (
                    row.get("absent") or f"{row['ms']:9.2f} ms{row['ratio']:9.3f} x SGD, host {row['host_ms']:.2f} ms"
                )
                print(f"  {contender.name:32} {told}", flush=True)

    return work


def measured(
    run: Run, case: dict[str, Any], network: Network, contender: Contender, size: int, slot: float
) -> dict[str, Any] | None:
    """A contender's row; None if there was no time for it."""
    began = time.monotonic()

    def attempt(batch: int) -> dict[str, Any]:
        return figures(network, contender, batch, run.device, run.effort, run.seed, slot, run.end)

    try:
        found = smaller(size, attempt, run.device)
    except OutOfTimeError:
        run.left.append(f"{case['case']}: {contender.name}")
        return None
    except Exception as error:
        if contender.optional and isinstance(error, REFUSALS):
            return {"name": contender.name, "absent": f"refused: {failure(error)}"}
        row = {"name": contender.name, "failed": failure(error)}
        run.results.row(case, row)
        survive(run, case, contender.name, error)
        return None
    first, last = found["loss_first"], found["loss_last"]
    run.results.check(case, f"{contender.name}: losses are finite", found["finite"])
    run.results.check(case, f"{contender.name}: the loss falls", last < first, f"from {first:.4f} to {last:.4f}")
    return {"name": contender.name, **found, "seconds": round(time.monotonic() - began, 2)}


# --- trace ---


def traced(network: Network, size: int) -> Callable[[Run, dict[str, Any], float], None]:
    def work(run: Run, case: dict[str, Any], deadline: float) -> None:
        done = {row["name"] for row in case["rows"]}
        for contender in contenders(run.device):
            if contender.name not in TRACED or contender.name in done or contender.absent:
                continue
            if time.monotonic() > deadline:
                run.left.append(f"{case['case']}: {contender.name}")
                continue
            row: dict[str, Any] = {"name": contender.name}
            name = "".join(c if c.isalnum() else "-" for c in contender.name.lower()).strip("-")
            path = run.results.path.with_name(f"{run.results.path.stem}-trace-{name}.json.gz")
            try:
                row |= {"batch": size, "file": path.name, **one_trace(run, network, contender, size, path)}
                if run.device.type == "cuda" and not row.get(WHOLE, {}).get("kernels"):
                    row["absent"] = "the profiler saw no kernel: this machine does not let it"
                run.results.check(case, f"{contender.name}: the trace has the step", {WHOLE, INSIDE} <= row.keys())
            except Exception as error:
                run.results.row(case, {**row, "failed": failure(error)})
                survive(run, case, contender.name, error)
            else:
                run.results.row(case, row)

    return work


def one_trace(run: Run, network: Network, contender: Contender, size: int, path: Path) -> dict[str, Any]:
    """What the trace of one step says, the contender in its usual step."""
    free(run.device)
    runner = Runner(network, contender, size, run.device, run.seed)
    for _ in range(contender.warm if run.effort.warm else 2):
        runner.step()
    return trace(runner, path)


# --- tests ---


def tests(run: Run, case: dict[str, Any], deadline: float) -> None:
    """The tests marked `gpu`, in a process of their own; a dry run takes a few of their bodies on the CPU."""
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    if not files or importlib.util.find_spec("pytest") is None:
        run.results.row(case, {"name": "pytest", "absent": "pytest or the folder tests is not there"})
        return
    free(run.device)
    source = str(Path(natgrad.__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    chosen = ["-k", "survives and cpu or sketches and cpu"] if run.dry else ["-m", "gpu"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            *chosen,
            *files,
        ]
        seconds = max(1.0, deadline - time.monotonic())
        try:
            ended = subprocess.run(
                words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
            )
            tail = (ended.stdout + ended.stderr)[-2000:]
        except subprocess.TimeoutExpired as late:
            told = late.stdout or b""
            tail = (told.decode(errors="replace") if isinstance(told, bytes) else told)[-2000:]
            run.results.row(case, {"name": "pytest", "failed": f"not at its end after {seconds:.0f} s", "tail": tail})
            run.results.check(case, "the marked tests end in time", False, f"{seconds:.0f} s were not enough")
            return
        row = {"name": "pytest", **reported(report), "exit_code": ended.returncode}
    if ended.returncode:
        row["tail"] = tail
        print(tail, flush=True)
    run.results.row(case, row)
    run.results.check(case, "some marked tests ran", row["passed"] > 0, f"exit code {ended.returncode}")
    run.results.check(case, "the marked tests pass", ended.returncode == 0, "; ".join(row["failing"]))


def reported(path: Path) -> dict[str, Any]:
    """Counts and names of pytest's report; zeros if pytest has not come to write one."""
    cases = list(ElementTree.parse(path).iter("testcase")) if path.exists() else []
    bad = [one for one in cases if one.find("failure") is not None or one.find("error") is not None]
    skipped = [one for one in cases if one.find("skipped") is not None]
    failing = []
    for one in bad:
        found = next(child for child in one if child.tag in ("failure", "error"))
        failing.append(f"{one.get('name')}: {(found.get('message') or 'no message').splitlines()[0]}")
    return {
        "passed": len(cases) - len(bad) - len(skipped),
        "failures": len(bad),
        "skipped": len(skipped),
        "failing": failing,
        "reasons": sorted({(one.find("skipped").get("message") or "") for one in skipped}),  # type: ignore[union-attr]
    }


# --- training ---


def training(size: Size) -> Callable[[Run, dict[str, Any], float], None]:
    def work(run: Run, case: dict[str, Any], deadline: float) -> None:
        if not run.data:
            print("  no --data, a folder of CIFAR-100's parquet files: patterns show the throughput only", flush=True)
        free(run.device)
        case["rows"] = []
        for row in learn(size, run.data, run.device, deadline):
            run.results.row(case, row)
            run.results.check(case, f"{row['name']}: losses are finite", row["finite"])
            first, last = row["loss_by_epoch"][0], row["loss_by_epoch"][-1]
            fell = last < first or row["epochs"] < 2
            run.results.check(case, f"{row['name']}: the loss falls", fell, f"from {first:.4f} to {last:.4f}")
            accuracy = f", accuracy {row['test_accuracy']:.2%}" if run.data else ""
            print(
                f"  {row['name']:32} {row['epochs']} epochs, {row['images_per_second']:,} images/s{accuracy}",
                flush=True,
            )

    return work


# --- all ---


def stages(dry: bool) -> list[Stage]:
    """All of them, in the order of their worth."""
    if dry:
        return [
            Stage("small", 25, small),
            of_steps(SMALL_RESNET, 8, 85),
            Stage("trace", 30, traced(SMALL_RESNET, 8), about(SMALL_RESNET, 8)),
            Stage("tests", 80, tests),
            of_steps(SMALL_GPT, 4, 80),
            Stage("training", math.inf, training(Size(8, 64, 32, 128, 2)), {"network": "ResNet-8 in batches of 64"}),
        ]
    return [
        Stage("small", 20, small),
        of_steps(RESNET, 128, 80),
        Stage("trace", 30, traced(RESNET, 128), about(RESNET, 128)),
        Stage("tests", 70, tests),
        of_steps(GPT, 16, 75),
        of_steps(RESNET, 32, 40),
        of_steps(RESNET, 256, 55),
        Stage("training", math.inf, training(Size()), {"network": "ResNet-32 in batches of 16,384"}),
    ]


def of_steps(network: Network, size: int, most: float) -> Stage:
    return Stage(f"steps: {network.name}, {size}", most, steps(network, size), about(network, size))


def about(network: Network, size: int) -> dict[str, Any]:
    return {"network": network.name, "batch": size, "unit": network.unit}


def carry_out(run: Run, listed: list[Stage], seconds: float) -> None:
    """All stages that are not finished, each within its part of the time."""
    for stage in listed:
        case = run.results.case(stage.name, **stage.settings)
        if case["finished"]:
            print(f"{stage.name}: done in an earlier start", flush=True)
            continue
        began = time.monotonic()
        if run.end - began < min(LEAST, LEAST * seconds / (60 * MINUTES)):
            run.left.append(stage.name)
            continue
        deadline = min(run.end, began + stage.most * seconds / (60 * MINUTES))
        print(f"{stage.name}: {deadline - began:.0f} s at most", flush=True)
        missing = len(run.left)
        try:
            stage.work(run, case, deadline)
        except DeviceLostError:
            run.results.write()
            raise
        except Exception as error:
            case["finished"] = True  # before the device is looked at: a new process must not fail here again
            survive(run, case, stage.name, error)
        case["finished"] = len(run.left) == missing
        case["seconds"] = round(case["seconds"] + time.monotonic() - began, 1)
        run.results.write()


def main(words: list[str] | None = None) -> int:
    """Run; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for this start")
    parser.add_argument("--data", default="", help="folder of CIFAR-100's parquet files (hub: uoft-cs/cifar100)")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--again", action="store_true", help="try again what failed in an earlier start")
    parser.add_argument("--commit", default="", help="the commit, where the code is a copy without its repository")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="file of results; benchmarks/results/gpu.json, runs/gpu-dry.json if dry"
    )
    told = parser.parse_args(words)
    end = time.monotonic() + 60 * told.minutes
    if told.minutes <= 0:
        parser.error(f"--minutes {told.minutes:g}: give a time above 0")
    if not told.dry and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --dry runs the same code in tiny sizes on the CPU")
    if told.data:
        try:
            Cifar100(told.data).check()
        except (ValueError, ImportError) as error:
            parser.error(f"--data {told.data}: {error}")
    device = torch.device("cpu") if told.dry else torch.device("cuda", 0)
    if told.dry:
        torch.set_num_threads(1)
    out = told.out or (Path("runs/gpu-dry.json") if told.dry else ROOT / "benchmarks" / "results" / "gpu.json")
    results = Results(out, device, told.seed, told.dry, told.commit)
    results.content["command"] = command(told)
    if told.again:
        results.forget_failures()
    effort = Effort(1, 1, warm=False) if told.dry else Effort(12, 4)
    run = Run(results, device, end, effort, told.dry, told.seed, told.data)
    print(f"{results.content['machine']}, torch {torch.__version__}, commit {results.content['commit']}", flush=True)
    carry_out(run, stages(told.dry), 60 * told.minutes)
    for name in run.left:
        print(f"no time left for {name}; the same command goes on from here", flush=True)
    every = [one for case in results.content["cases"] for one in case["checks"]]
    failed = results.failed()
    print(f"{len(every) - len(failed)} of {len(every)} checks passed; {out}", flush=True)
    for name in failed:
        print(f"FAILED {name}", flush=True)
    return 1 if failed else 0


def command(told: argparse.Namespace) -> str:
    """What was called, without anybody's paths."""
    parts = ["python benchmarks/gpu.py", "--dry" if told.dry else "", "--data FOLDER" if told.data else ""]
    return " ".join(part for part in parts if part)


if __name__ == "__main__":
    started, timed = time.monotonic(), argparse.ArgumentParser(add_help=False)
    timed.add_argument("--minutes", type=float, default=MINUTES)
    minutes = timed.parse_known_args()[0].minutes
    faulthandler.dump_traceback_later(60 * minutes + GRACE, exit=True)
    try:
        sys.exit(main())
    except DeviceLostError as lost:  # a process that has lost its device cannot get it back
        rest = minutes - (time.monotonic() - started) / 60
        print(f"the device is lost after {lost}; a new process goes on with {rest:.1f} minutes", flush=True)
        if rest <= 0.2:
            sys.exit(1)
        os.execv(sys.executable, [sys.executable, *sys.argv, "--minutes", f"{rest:.2f}"])
