"""Random small programs against a dense reference: is any step other than the papers' formulas say?

    python benchmarks/fuzz.py --examples 1000                    (some minutes on one core)
    python benchmarks/fuzz.py --examples 1000 --seed 7           (others than those that are always the same)
    python benchmarks/fuzz.py --examples 1000 --keep             (write benchmarks/results/fuzz.json)

A program is a model (linear, convolutions, norms, embeddings, shared weights, frozen parameters, parameters of no
layer), an optimizer with its settings, a type, a batch, passes and ranks (threads). Its weights after every step are
compared with those of a reference that knows nothing of natgrad (fuzz_reference.py): rows by evaluating layers at unit
weights, damped Fisher blocks written out and solved in float64. What differs is printed as the program that shows it.
tests/test_fuzz.py runs some of them in every run of the suite.
"""

from __future__ import annotations

import argparse
import copy
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from fuzz_programs import (
    TYPES,
    VECTORS,
    Program,
    blocks_of,
    build,
    data,
    loss_of,
    optimizer_of,
    programs,
    reference_settings,
)
from fuzz_reference import Reference
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from record import Record
from torch import Tensor, nn

from natgrad.parallel import run_threads

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
TOLERANCES = {"float64": 1e-10, "float32": 1e-3, "bfloat16": 0.3, "float16": 0.1}
"""By so much of how far the reference has gone the weights may differ, or, where numbers are sensitive, by so many
times what a rounding of weights and samples does to the reference itself:"""
SHAKEN, DRAWS = 30, 3


class DifferenceError(AssertionError):
    """A step that is not the reference's."""


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def precise(models: Sequence[nn.Module], optimizers: Sequence[Any]) -> Tensor:
    """The weights as their owners keep them: in half precision these are the masters."""
    found = []
    for same in zip(*(model.parameters() for model in models)):
        masters = [opt.state[p]["master"] for p, opt in zip(same, optimizers) if "master" in opt.state.get(p, {})]
        found.append((masters or same)[0].detach().double().flatten())
    return torch.cat(found)


def ours(program: Program) -> list[Tensor]:
    """The weights after each step, in double precision; DifferenceError where ranks have not the same."""
    built, last = build(program).to(TYPES[program.dtype]), torch.preserve_format
    if "channels last" in program.ways:
        last = torch.channels_last
    models = [copy.deepcopy(built).to(memory_format=last) for _ in range(program.ranks)]
    optimizers: list[Any] = [None] * program.ranks
    found, meet = list[Tensor](), threading.Barrier(program.ranks)

    def work(world: Any) -> None:
        scaler = torch.amp.GradScaler("cpu", 2.0**4, enabled="scaled" in program.ways)
        optimizer = optimizers[world.rank] = optimizer_of(program, models[world.rank], world, scaler)
        for step, (lr, damping) in enumerate(zip(program.rates, program.dampings)):
            model = models[world.rank]
            for group, share in zip(optimizer.param_groups, shares(program, optimizer)):
                group |= {"lr": lr * share, "damping": damping}
            own = chunks_of(program, step)[world.rank :: world.size]
            for k, (x, y) in enumerate(own, 1):
                x = x.to(TYPES[program.dtype], memory_format=last) if x.is_floating_point() else x
                loss, *_ = loss_of(program, model, x, y)
                loss = loss / program.chunks if program.settings["reduction"] == "mean" else loss
                with optimizer.no_sync() if k < len(own) else nullcontext():
                    scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if "resumed" in program.ways and step == 0:
                saved = optimizer.gather_state_dict()
                models[world.rank] = copy.deepcopy(model)
                optimizer = optimizers[world.rank] = optimizer_of(program, models[world.rank], world, scaler)
                optimizer.load_state_dict(copy.deepcopy(saved))
            if not meet.wait(60):  # one looks at all, while the others wait
                if any(not torch.equal(flat(other), flat(models[0])) for other in models):
                    raise DifferenceError(f"ranks differ: {program}")
                found.append(precise(models, optimizers))
            meet.wait(60)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_threads(program.ranks, work, **program.world)
    return found


def shares(program: Program, optimizer: Any) -> list[float]:
    """What the learning rate of each param_group is times that of matrices."""
    apart = "groups" in program.ways
    return [VECTORS if apart and group["params"][0].dim() < 2 else 1.0 for group in optimizer.param_groups]


def chunks_of(program: Program, step: int) -> list[tuple[Tensor, Tensor]]:
    """What goes through the network in one pass each; rank r has those at r, r + ranks, ..."""
    x, y = data(program, step)
    count = program.chunks * program.ranks
    return list(zip(x.chunk(count), y.chunk(count)))


def theirs(program: Program, shaken: int | None = None) -> tuple[list[Tensor], Tensor]:
    """The reference's weights after each step, and those before the first one.

    shaken: weights, samples, outputs of layers and their gradients are off by a rounding of the program's type, and
    matrices that are inverted by one of the type in which curvature is kept, drawn with this seed.
    """
    generator, limits = torch.Generator().manual_seed(shaken or 0), torch.finfo(TYPES[program.dtype])

    def shake(x: Tensor) -> Tensor:
        if shaken is None or not x.is_floating_point():
            return x
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return x * (1 + limits.eps * noise) + limits.smallest_normal * limits.eps * noise

    def shake_both(x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(shake)
        return shake(x)

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, int]:
        return loss_of(program, net, x, y)

    def shake_matrix(matrix: Tensor) -> Tensor:
        noise = torch.randn(matrix.shape, generator=generator, dtype=torch.float64)
        kept = torch.finfo(torch.promote_types(TYPES[program.dtype], torch.float32))
        return matrix * (1 + kept.eps * (noise + noise.T) / 2)

    model = build(program)
    for parameter in model.parameters():
        parameter.data = shake(parameter.data)
    model.shake = model.shake if shaken is None else shake_both
    start = flat(model)
    reference, found = Reference(model, reference_settings(program), blocks_of(program)), []
    reference.shake = reference.shake if shaken is None else shake_matrix
    for step, (lr, damping) in enumerate(zip(program.rates, program.dampings)):
        chunks = [(shake(x), y) for x, y in chunks_of(program, step)]
        reference.step(chunks, loss, lr, damping, program.ranks)
        found.append(flat(model))
    return found, start


def error(program: Program) -> tuple[float, float]:
    """How far the weights are from the reference's at most, and the reference's own from those of shaken numbers.

    Both are shares of how far the reference has gone. The second one is 0 where the first one is small.
    """
    steps, (expected, start) = ours(program), theirs(program)
    gone = max(float(torch.stack([(w - start).norm() for w in expected]).max()), 1e-12)
    rounding = float(start.norm()) * (1e-15 if program.dtype == "float64" else 1e-7)  # of the weights as they are kept
    if not all(bool(torch.isfinite(found).all()) for found in steps):
        raise DifferenceError(f"not finite: {program}")
    away = max(float((found - right).norm()) for found, right in zip(steps, expected, strict=True)) - rounding
    apart = 0.0
    for draw in range(DRAWS if away > TOLERANCES[program.dtype] * gone else 0):
        shaken, begun = theirs(program, draw)
        apart = max(apart, *(float((s - begun - right + start).norm()) for s, right in zip(shaken, expected)))
    return away / gone, apart / gone


def check(program: Program) -> float:
    """The error of a program; DifferenceError where it is above what its type may have."""
    found, shaken = error(program)
    if found > max(TOLERANCES[program.dtype], SHAKEN * shaken):
        raise DifferenceError(f"{found:.2g} of the way, and {shaken:.2g} by rounding alone: {program}")
    return found


def features(program: Program) -> list[str]:
    """What a program is counted by."""
    names = {name for name, _ in program.stages} - {"Flatten", "MeanPlaces", "PlacesLast"}
    told = [program.optimizer, program.dtype, f"{program.ranks} ranks", program.loss, program.given[0], *sorted(names)]
    told += [f"length={program.settings.get('length', 'plain')}", f"{program.chunks} passes"]
    told += [f"twist={program.twist}"] if program.twist else []
    told += [*program.ways, *(["frozen"] if program.frozen else [])]
    told += [f"{key}={value}" for key, value in program.world.items()]
    curvature = program.settings.get("curvature")
    return told + ([f"curvature={curvature[0]}, norms {curvature[1]}"] if curvature else [])


def run(examples: int, seed: int | None = None, stop: bool = False) -> dict[str, Any]:
    """Make so many programs; what was counted, the errors by type, and those that differ."""
    counted, failures, seen = Counter[str](), list[str](), set[str]()
    worst = dict.fromkeys(TYPES, 0.0)
    begin = time.perf_counter()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=seed is None,
        phases=[Phase.generate, *([Phase.shrink] if stop else [])],
        suppress_health_check=list(HealthCheck),
    )
    @given(programs())
    def one(program: Program) -> None:
        seen.add(repr(program))
        counted.update(["all", *features(program)])
        try:
            worst[program.dtype] = max(worst[program.dtype], check(program))
        except Exception as problem:
            if stop:
                raise
            last = traceback.extract_tb(problem.__traceback__)[-1]
            failures.append(
                f"{program}\n{type(problem).__name__}: {problem}\n{Path(last.filename).name}, {last.name}: {last.line}"
            )

    if seed is not None:
        one = seeded(seed)(one)
    one()
    seconds = time.perf_counter() - begin
    told = {"programs": counted.pop("all"), "unlike": len(seen), "seconds": round(seconds, 1), "worst": worst}
    return {**told, "counted": dict(sorted(counted.items())), "failures": failures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, help="other programs than those that are always the same")
    parser.add_argument("--stop", action="store_true", help="end at the first that differs, made as small as can be")
    parser.add_argument("--keep", action="store_true", help=f"write {RESULTS.name}")
    told = parser.parse_args()
    torch.set_num_threads(1)
    found = run(told.examples, told.seed, told.stop)
    for failure in found["failures"]:
        print(failure, end="\n\n")
    print(f"{found['programs']} programs in {found['seconds']} s, {len(found['failures'])} differ")
    print("largest differences:", ", ".join(f"{name} {value:.2g}" for name, value in found["worst"].items()))
    if told.keep:
        Record(RESULTS, "cpu", seed=told.seed).add({"examples": told.examples}, [found])


if __name__ == "__main__":
    main()
