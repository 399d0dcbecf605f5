"""Does a step cost more late in a run? What an optimizer of 5,000 steps does and holds, beside one of none.

    python benchmarks/age.py --keep     (some minutes for each optimizer; it goes on where it was stopped)

The run is the long one of soak.py. Two stretches are counted: operations of torch, calls of Python functions, objects,
hooks, and entries of all containers that the optimizer reaches. Then the run's weights and state go to a new process,
which builds an optimizer of its own. Both take the same steps, in turns, and must come to the same weights to the last
bit. What differs is age alone: the ratio of their processor times, old over new, with its standard error over turns.
(The new one begins with some more checksums: a layer's first measurements have one each.)
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import hashlib
import io
import math
import multiprocessing
import statistics
import time
import warnings
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import soak
import torch
from record import Record
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import natgrad

RESULTS = Path(__file__).parent / "results" / "age.json"
AGE, STRETCH, TURN = 5000, 500, 10
"""Steps of the old run; of a stretch that is counted, one period of its learning rate; of a turn."""
CONTAINERS = (dict, list, set, tuple, deque)
NOT_ENTERED = (Tensor, nn.Module, FunctionType, MethodType, ModuleType, FrameType, type, str, bytes)


class Operations(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def reached(root: Any) -> Iterator[Any]:
    """Every object that an optimizer reaches, models and functions aside."""
    seen, waiting = {id(root)}, [root]
    while waiting:
        one = waiting.pop()
        yield one
        for other in gc.get_referents(one):
            if id(other) not in seen and not isinstance(other, NOT_ENTERED):
                seen.add(id(other))
                waiting.append(other)


def held(run: soak.LongRun) -> dict[str, int]:
    """How many objects and tensors there are, hooks on the model, and entries in the optimizer's containers."""
    run.optimizer.settle()
    tensors = soak.tensors_alive()
    own = [one for one in reached(run.optimizer) if isinstance(one, CONTAINERS)]
    return {
        "objects": len(gc.get_objects()),
        "tensors": tensors,
        "hooks": soak.hooks_on(run.model),
        "containers": len(own),
        "entries": sum(map(len, own)),
        "longest": max(map(len, own)),
    }


def counted(run: soak.LongRun, steps: range) -> dict[str, float]:
    """Operations and calls of functions a step."""
    operations, profile = Operations(), cProfile.Profile()
    for step in steps:
        with operations:
            profile.enable()
            run.step(step)
            profile.disable()
        run.between(step)
    calls = sum(entry.callcount for entry in profile.getstats())
    return {"operations": operations.count / len(steps), "calls": calls / len(steps)}


def state_of(run: soak.LongRun) -> bytes:
    """All that a run goes on from."""
    buffer = io.BytesIO()
    kept = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    torch.save({**kept, "scaler": run.scaler.state_dict(), "schedule": run.schedule.state_dict()}, buffer)
    return buffer.getvalue()


def resumed(name: str, state: bytes) -> soak.LongRun:
    """A run that has been built anew and goes on from there."""
    run, kept = soak.LongRun(name), torch.load(io.BytesIO(state), weights_only=True)
    for part in ("model", "scaler", "schedule", "optimizer"):
        getattr(run, part).load_state_dict(kept[part])
    return run


def digest(model: nn.Module) -> str:
    """All weights, to the last bit."""
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


def turn(run: soak.LongRun, steps: range) -> float:
    """Seconds of processor time that some steps take."""
    begin = time.process_time()
    for step in steps:
        run.step(step)
    took = time.process_time() - begin
    for step in steps:
        run.between(step)
    return took


def new_process(name: str, told: Connection) -> None:
    """Take the turns that one is told to take."""
    quiet()
    run = resumed(name, told.recv_bytes())
    while (steps := told.recv()) is not None:
        told.send(turn(run, steps))
    told.send(digest(run.model))


def beside_a_new_one(run: soak.LongRun, begin: int, steps: int) -> dict[str, Any]:
    """Take steps in turns with a process of no age; who begins changes with every turn."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=new_process, args=(run.name, theirs))
    process.start()
    state = state_of(run)
    run.optimizer.load_state_dict(
        torch.load(io.BytesIO(state), weights_only=True)["optimizer"]
    )  # as the other one does
    ours.send_bytes(state)
    old, new = [], []
    for number, first in enumerate(range(begin, begin + steps, TURN)):
        one = range(first, first + TURN)
        if number % 2:
            old.append(turn(run, one))
        ours.send(one)
        new.append(ours.recv())
        if not number % 2:
            old.append(turn(run, one))
    ours.send(None)
    same = ours.recv() == digest(run.model)
    process.join()
    ratios = [math.log(a / b) for a, b in zip(old, new)][len(old) // 5 :]  # the new process warms up at first
    mean, error = statistics.fmean(ratios), statistics.stdev(ratios) / math.sqrt(len(ratios))
    told = {
        "ratio": math.exp(mean),
        "error": error,
        "median": math.exp(statistics.median(ratios)),
        "turns": len(ratios),
    }
    return {**told, "same weights": same, "ms": 1000 * statistics.median(old) / TURN}


def aged(name: str, age: int) -> dict[str, Any]:
    """One optimizer, early and late."""
    run = soak.LongRun(name)
    length = min(STRETCH, age // 5)
    early, late = range(age // 5, age // 5 + length), range(age - length, age)
    told: dict[str, Any] = {}
    for step in range(early.start):
        run.step(step)
        run.between(step)
    for when, stretch in (("early", early), ("late", late)):
        for step in range(early.stop, stretch.start):
            run.step(step)
            run.between(step)
        told[when] = {**counted(run, stretch), **held(run)}
    return {**told, "beside": beside_a_new_one(run, age, 1000)}


def quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", natgrad.NatgradWarning)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=AGE, help="how old the old run is")
    parser.add_argument("--only", choices=[*soak.OPTIMIZERS])
    parser.add_argument("--keep", action="store_true", help=f"write {RESULTS.name}")
    given = parser.parse_args()
    quiet()
    record = Record(RESULTS, "cpu", steps=given.steps)
    for name in soak.OPTIMIZERS if given.only is None else [given.only]:
        case = {"optimizer": name}
        if given.keep and record.find(case) is not None:
            continue
        found = aged(name, given.steps)
        print(name, found, flush=True)
        if given.keep:
            record.add(case, [found])


if __name__ == "__main__":
    main()
