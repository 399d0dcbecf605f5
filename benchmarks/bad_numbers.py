"""What becomes of a run that meets bad numbers: right, skipped and counted, dropped and counted, or refused?

    python benchmarks/bad_numbers.py --keep     (all optimizers; writes benchmarks/results/bad_numbers.json)

Two kinds of cases. Degenerate data (dead layers, samples that are all the same, scales of 1e-30 and 1e30) has a right
answer: the steps are compared with the dense float64 reference of the fuzz (fuzz_reference.py). Numbers that are not
finite, and what memory or a processor may get wrong, have none: the run is compared with one that never met them, and
what was counted is looked at. An outcome that is none of the good ones is written as WRONG, with the numbers.
tests/test_bad_numbers.py has every case as a law.
"""

from __future__ import annotations

import argparse
import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fuzz
import torch
from fuzz_programs import Program
from record import Record
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad
from natgrad.parallel import run_threads

RESULTS = Path(__file__).parent / "results" / "bad_numbers.json"
NAN, INF = math.nan, math.inf
STEPS = 8
AT = 4
"""The step that goes wrong. Every second step measures, this one too."""

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SPNGD": lambda model, **options: natgrad.SPNGD(model, 0.05, **{"refresh": 2, "damping": 0.03, **options}),
    "KFAC": lambda model, **options: natgrad.KFAC(model, 0.05, **{"refresh": 2, "damping": 0.03, **options}),
    "SENG": lambda model, **options: natgrad.SENG(model, 0.05, **{"refresh": 2, "damping": 0.03, **options}),
    "NLCG": lambda model, **options: natgrad.NLCG(model, 0.05, **options),
    "NLCG, curvature": lambda model, **options: natgrad.NLCG(
        model, 0.02, **{"preconditioner": natgrad.spngd_blocks, "refresh": 2, **options}
    ),
}
CURVED = tuple(name for name in OPTIMIZERS if name != "NLCG")
FACTORED = ("SPNGD", "KFAC", "NLCG, curvature")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))


def batch(step: int, samples: int = 64) -> tuple[Tensor, Tensor]:
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(step))
    return x, x[:, :3].argmax(1)


@dataclass(frozen=True)
class Case:
    """One thing that goes wrong. Functions are told the step and the rank.

    expects: the outcomes that are good. left_out: the steps that a run without the fault does not have.
    """

    name: str
    expects: tuple[str, ...]
    ranks: int = 1
    left_out: tuple[int, ...] = ()
    data: Callable[[int, int, Tensor, Tensor], tuple[Tensor, Tensor]] = lambda step, rank, x, y: (x, y)
    loss: Callable[[int, int, Tensor], Tensor] = lambda step, rank, loss: loss
    before: Callable[[int, int, nn.Module, Any], None] = lambda step, rank, model, optimizer: None
    around: Callable[[], Any] = nullcontext
    options: dict[str, Any] = field(default_factory=dict)
    scale: float | None = None  # of a GradScaler, with float16 autocast
    only: tuple[str, ...] = tuple(OPTIMIZERS)


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    told: str
    good: bool
    numbers: dict[str, Any]


def in_batch(value: float, rank: int = 0, at: int = AT) -> Callable[..., Any]:
    def data(step: int, own: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if (step, own) == (at, rank):
            x[0, 0] = value
        return x, y

    return data


def in_gradient(value: float) -> Callable[..., Any]:
    def before(step: int, rank: int, model: nn.Module, optimizer: Any) -> None:
        if (step, rank) == (AT, 0):
            model[3].weight.grad[0, 0] = value  # type: ignore[index, union-attr]

    return before


def in_state(end: str, value: float) -> Callable[..., Any]:
    """A number of the optimizer's state is changed, as a bit that flips does."""

    def before(step: int, rank: int, model: nn.Module, optimizer: Any) -> None:
        if step == AT:
            known = [
                (k, v)
                for own in optimizer.state.values()
                for k, v in own.items()
                if v.dim() and v.dtype.is_floating_point
            ]
            next(v for k, v in known if k.endswith(end)).view(-1)[0] = value

    return before


def in_group(name: str, value: Any) -> Callable[..., Any]:
    def before(step: int, rank: int, model: nn.Module, optimizer: Any) -> None:
        if step == AT:
            optimizer.param_groups[0][name] = value

    return before


@contextmanager
def failing(times: int) -> Iterator[None]:
    """The next so many factorisations fail."""
    real, left = torch.linalg.cholesky_ex, [times]

    def fails(matrix: Tensor) -> Any:
        factor, info = real(matrix)
        left[0] -= 1
        return factor, torch.ones_like(info) if left[0] >= 0 else info

    torch.linalg.cholesky_ex = fails  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.linalg.cholesky_ex = real


def overflowing(step: int, rank: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs whose squares leave single precision, though nothing else does (a norm follows)."""
    return (x * 1e19 if step == AT else x), y


LEFT_OUT, TRAINS, RIGHT = "skipped, counted, as if it had not been", "trains, loss falls", "right"
DROPPED, ANEW, DAMPED = "statistics dropped, counted", "statistics dropped, begun anew", "more damping, counted"
REFUSED, LOST = "refused in one line", "skips all later steps, counted and said"
SOME = "skips some steps, counted, then trains"

CASES = (
    Case("nothing", (TRAINS,)),
    Case("nothing, 2 ranks", (TRAINS,), 2),
    Case("NaN in a batch", (LEFT_OUT,), left_out=(AT,), data=in_batch(NAN)),
    Case("inf in a batch", (LEFT_OUT,), left_out=(AT,), data=in_batch(INF)),
    Case("NaN in the first batch", (LEFT_OUT,), left_out=(0,), data=in_batch(NAN, at=0)),
    Case("NaN in one of two ranks' batches", (LEFT_OUT,), 2, (AT,), in_batch(NAN, 1)),
    Case("inf in one of two ranks' batches", (LEFT_OUT,), 2, (AT,), in_batch(INF, 1)),
    Case("NaN in one layer's gradient", (LEFT_OUT,), left_out=(AT,), before=in_gradient(NAN)),
    Case("inf in one layer's gradient, 2 ranks", (LEFT_OUT,), 2, (AT,), before=in_gradient(INF)),
    Case("gradients whose sum over 2 ranks is infinite", (LEFT_OUT,), 2, (AT,), before=in_gradient(3e38)),
    Case("a statistic overflows", (DROPPED,), data=overflowing, only=CURVED),
    Case(
        "NaN in a statistic that is kept", (ANEW,), before=in_state("A", NAN), options={"ema_decay": 0.5}, only=FACTORED
    ),
    Case(
        "inf in a statistic that is kept", (ANEW,), before=in_state("A", INF), options={"ema_decay": 0.5}, only=FACTORED
    ),
    Case(
        "a statistic that is not positive",
        (DAMPED,),
        before=in_state("A", -1e4),
        options={"ema_decay": 0.5},
        only=FACTORED,
    ),
    Case("three factorisations fail", (DAMPED, TRAINS), around=lambda: failing(3), only=CURVED),
    Case("every factorisation fails", (DAMPED,), around=lambda: failing(10**9), only=CURVED),
    Case("NaN in a momentum", (LOST,), before=in_state("momentum", NAN), only=("SPNGD", "KFAC", "SENG")),
    Case("NaN in a last direction", (LOST,), before=in_state("direction", NAN), only=("NLCG", "NLCG, curvature")),
    Case("lr is NaN", (REFUSED,), before=in_group("lr", NAN)),
    Case("lr is infinite", (REFUSED,), before=in_group("lr", INF)),
    Case("lr is below 0", (REFUSED,), before=in_group("lr", -1e-3)),
    Case("damping is 0", (REFUSED,), before=in_group("damping", 0.0), only=CURVED),
    Case("damping is NaN", (REFUSED,), before=in_group("damping", NAN), only=CURVED),
    Case("weight decay is NaN", (REFUSED,), before=in_group("weight_decay", NAN)),
    Case("loss times 1e-20", (TRAINS, "stands, as its damping says"), loss=lambda step, rank, loss: 1e-20 * loss),
    Case(
        "loss times 1e20",
        (TRAINS, DROPPED, DAMPED),
        loss=lambda step, rank, loss: 1e20 * loss,
        only=("SPNGD", "KFAC", "SENG"),
    ),
    Case("loss times 1e30", (DROPPED,), loss=lambda step, rank, loss: 1e30 * loss, only=("SPNGD", "KFAC", "SENG")),
    Case("inputs times 1e18", (TRAINS, DROPPED, DAMPED), data=lambda step, rank, x, y: (1e18 * x, y)),
    Case("the same samples on 2 ranks", (TRAINS,), 2, data=lambda step, rank, x, y: batch(step, 32)),
    Case(
        "the same samples on 2 ranks at first",
        (TRAINS,),
        2,
        data=lambda step, rank, x, y: batch(step, 32) if step < 2 else (x, y),
    ),
    Case(
        "an empty batch on one of 2 ranks",
        (TRAINS,),
        2,
        data=lambda step, rank, x, y: (x[:0], y[:0]) if (step, rank) == (AT, 1) else (x, y),
    ),
    Case(
        "no gradient at all, 2 ranks",
        (TRAINS,),
        2,
        loss=lambda step, rank, loss: 0 * loss if step in (0, AT) else loss,
    ),
    Case("float16, the loss's scale too large", (SOME,), scale=2.0**20),
    Case("float16, 2 ranks, the scale too large", (SOME,), 2, scale=2.0**20),
    Case("float16 without a scale", (TRAINS,), scale=1.0),
)


def play(case: Case, name: str, left_out: tuple[int, ...] = (), faulty: bool = True) -> dict[str, Any]:
    """Train; what was counted, the weights of every rank, and the loss of fresh samples before and after."""
    start = network()
    models = [copy.deepcopy(start) for _ in range(case.ranks)]
    bad = case if faulty else Case("", ())
    steps = STEPS if LOST not in case.expects else AT + 11

    def work(world: Any) -> Any:
        model = models[world.rank]
        scaler = torch.amp.GradScaler("cpu", case.scale or 1.0, enabled=case.scale is not None)
        optimizer = OPTIMIZERS[name](model, world=world, **case.options)
        for step in (k for k in range(steps) if k not in left_out):
            x, y = (own.chunk(world.size)[world.rank].clone() for own in batch(step))
            x, y = bad.data(step, world.rank, x, y)
            with torch.autocast("cpu", torch.float16, enabled=case.scale is not None):
                output = model(x)
            loss = bad.loss(step, world.rank, F.cross_entropy(output.float(), y))
            scaler.scale(loss).backward()
            bad.before(step, world.rank, model, optimizer)
            if name == "NLCG":
                optimizer.report(loss)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        optimizer.settle()
        return optimizer

    with warnings.catch_warnings(record=True) as said, bad.around():
        warnings.simplefilter("always")
        try:
            optimizer = run_threads(case.ranks, work)[0]
        except ValueError as problem:
            return {"refused": str(problem)}
    weights = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models]
    return {
        "weights": weights[0],
        "alike": all(torch.equal(own.nan_to_num(7), weights[0].nan_to_num(7)) for own in weights),
        "finite": bool(torch.isfinite(weights[0]).all()),
        "skipped": optimizer.skipped,
        "dropped": optimizer.engine.dropped,
        "retries": optimizer.engine.retries,
        "first": mean_loss(start),
        "last": mean_loss(models[0]),
        "said": list(dict.fromkeys(str(w.message) for w in said if issubclass(w.category, natgrad.NatgradWarning))),
        "steps": optimizer.steps_made,
    }


@torch.no_grad()
def mean_loss(model: nn.Module) -> float:
    return sum(float(F.cross_entropy(model(x), y)) for x, y in (batch(1000 + k) for k in range(8))) / 8


def outcome(case: Case, name: str) -> Outcome:
    """Play a case and say what came of it."""
    found = play(case, name)
    if "refused" in found:
        told = REFUSED if "\n" not in found["refused"] and REFUSED in case.expects else f"WRONG: {found['refused']}"
        return Outcome(told, told in case.expects, found)
    told = _told(case, name, found)
    del found["weights"]
    return Outcome(told, told in case.expects, found)


def _told(case: Case, name: str, found: dict[str, Any]) -> str:
    if not found["alike"]:
        return "WRONG: ranks differ"
    if not found["finite"]:
        said = any("so no later step can be: load a checkpoint" in text for text in found["said"])
        return LOST if said and found["skipped"] >= 10 else f"WRONG: weights are not finite, {found['skipped']} skipped"
    if case.left_out:
        right = play(case, name, case.left_out, faulty=False)
        same = found["skipped"] == len(case.left_out) and torch.equal(right["weights"], found["weights"])
        return LEFT_OUT if same else f"WRONG: {found['skipped']} skipped"
    falls = found["last"] < found["first"]
    if found["dropped"] and ANEW in case.expects:
        return ANEW if falls else f"WRONG: loss {found['first']:.3g} to {found['last']:.3g}"
    if found["dropped"] or found["retries"]:
        told = DROPPED if found["dropped"] else DAMPED
        return (
            told
            if falls or case.loss(0, 0, torch.ones(())) > 1
            else f"WRONG: loss {found['first']:.3g} to {found['last']:.3g}"
        )
    if math.isclose(found["last"], found["first"], rel_tol=1e-4):
        return "stands, as its damping says"
    if falls and found["skipped"]:
        return SOME
    return TRAINS if falls else f"WRONG: loss {found['first']:.3g} to {found['last']:.3g}"


DEGENERATE = {
    "a dead layer (a head of zeros)": "dead",
    "a saturated layer (biases of 50)": "saturated",
    "a constant input": "constant",
    "inputs of zeros": "zeros",
    "samples that are all the same": "duplicates",
    "inputs times 1e-30": "tiny",
    "inputs times 1e30": "huge",
}


def program(name: str, twist: str, dtype: str = "float64", ranks: int = 1, samples: int = 4) -> Program:
    """Three steps of an optimizer on degenerate data, whose right result the reference knows."""
    layer = ("Linear", {"in_features": 3, "out_features": 3, "bias": True})
    settings: dict[str, Any] = {"reduction": "mean", "refresh": 2, "weight_decay": 0.01, "max_norm": None}
    if name == "SENG":
        settings |= {"columns": "empirical", "block": "layer"}
    else:
        norm = "identity" if name == "KFAC" else "unit"
        settings |= {"curvature": ("kron", norm), "ema_decay": 0.5 if name == "KFAC" else 0.0, "max_size": 8192}
    if name == "NLCG":
        settings |= {"beta": "fletcher_reeves"}
    else:
        settings |= {"momentum": 0.7, "before": False, "decoupled": True, "coefficient": "corrected"}
        settings |= {"length": "measured", "rescale": None}
    stages = (layer, ("LayerNorm", {"normalized_shape": 3}), layer)
    return Program(
        stages,
        ("vector", 3),
        "cross_entropy",
        name,
        settings,
        (0.1,) * 3,
        (0.03,) * 3,
        samples,
        1,
        ranks,
        {},
        dtype,
        twist=twist,
    )


def compared(name: str, twist: str, **options: Any) -> str:
    """Whether steps on degenerate data are the reference's."""
    try:
        fuzz.check(program(name, twist, **options))
    except fuzz.DifferenceError as problem:
        return f"WRONG: {str(problem).partition(':')[0]}"
    return RIGHT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help=f"write {RESULTS.name}")
    keep = parser.parse_args().keep
    torch.set_num_threads(1)
    found: dict[str, dict[str, str]] = {}
    for case in CASES:
        found[case.name] = {name: outcome(case, name).told for name in case.only}
    for title, twist in DEGENERATE.items():
        found[f"{title}, float64"] = {name: compared(name, twist) for name in OPTIMIZERS if "," not in name}
        found[f"{title}, float64, 2 ranks"] = {
            name: compared(name, twist, ranks=2) for name in OPTIMIZERS if "," not in name
        }
        if twist != "huge":
            found[f"{title}, float32"] = {
                name: compared(name, twist, dtype="float32") for name in OPTIMIZERS if "," not in name
            }
    found["a batch of 1, float64"] = {name: compared(name, "", samples=1) for name in OPTIMIZERS if "," not in name}
    if keep:
        RESULTS.unlink(missing_ok=True)
    record = Record(RESULTS, "cpu")
    for title, row in found.items():
        print(f"{title}: {row}")
        if keep:
            record.add({"case": title}, [row])


if __name__ == "__main__":
    main()
