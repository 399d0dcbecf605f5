"""Random small training programs: a model, its data, an optimizer with settings, ranks, all as plain values.

A Program prints as the line that makes it again. `programs()` is the hypothesis strategy for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from fuzz_reference import TiedHead
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad
from natgrad.curvature import Curvature, Identity
from natgrad.layers import Layer, UncurvedParameter
from natgrad.layers.norm import Norm
from natgrad.optim import KLClip, LayerBlocks, Momentum

Stage = tuple[str, dict[str, Any]]
CLASSES = 3
TYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
WAYS = ("groups", "resumed", "scaled", "directions", "channels last")
"""Vectors in a param_group of their own; a new optimizer loads the state after the first step; a GradScaler; owners
send directions; images in channels last."""
VECTORS = 0.3  # of the learning rate of matrices
TWISTS = ("", "duplicates", "constant", "zeros", "tiny", "dead", "saturated", "huge")
"""Samples that are all the same one; inputs of ones or zeros; inputs or the loss times 1e-30 or 1e30; a head of zeros,
through which no gradient comes; biases of 50, behind which every tanh is flat. Huge inputs are for double precision."""
LEAST = 3
"""Numbers that are normalised together: of two the result is always the same, and its gradient nothing but rounding."""
RUNS = {"images": 2, "signal": 1}
"""Dimensions behind the channels."""


@dataclass(frozen=True)
class Program:
    """One run. `batch` samples a chunk, `chunks` passes a step and rank, every rank its own."""

    stages: tuple[Stage, ...]
    given: tuple[Any, ...]  # "vector", d; "sequence", s, d; "signal", c, l; "images", c, h, w; "tokens", s, vocabulary
    loss: str = "cross_entropy"
    optimizer: str = "SPNGD"
    settings: dict[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = (0.1,)
    dampings: tuple[float, ...] = (0.03,)
    batch: int = 4
    chunks: int = 1
    ranks: int = 1
    world: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float64"
    frozen: tuple[int, ...] = ()  # parameters, by their place in the model
    ways: tuple[str, ...] = ()  # of WAYS
    twist: str = ""  # of TWISTS
    seed: int = 0


class Gain(nn.Module):
    """A parameter that belongs to no layer."""

    def __init__(self, size: int):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class MeanPlaces(nn.Module):
    """The mean over the places of [n, s, d]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class PlacesLast(nn.Module):
    """[n, c, ...] as [n, s, c]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).movedim(1, -1)


OWN: dict[str, Any] = {"Gain": Gain, "MeanPlaces": MeanPlaces, "PlacesLast": PlacesLast}
STRAIGHT = ("Flatten", "MeanPlaces", "PlacesLast", "Embedding", "TiedHead")


class Net(nn.Module):
    """Stages behind one another, with a tanh between; the head comes last."""

    def __init__(self, stages: tuple[Stage, ...]):
        super().__init__()
        self.stages = nn.ModuleList()
        self.bends: list[bool] = []
        self.shake: Callable[[Tensor], Tensor] = lambda x: x  # what a stage gives
        for name, options in stages:
            if name == "Again":
                module = self.stages[options["stage"]]
            elif name == "TiedHead":
                module = TiedHead(self.stages[0])  # type: ignore[arg-type]
            else:
                known = {k: v for k, v in options.items() if k != "evaluates"}
                module = OWN.get(name, getattr(nn, name, None))(**known)
                if options.get("evaluates"):
                    module.eval()
                    module.running_var.uniform_(0.5, 2.0)
            self.stages.append(module)
            self.bends.append(name not in STRAIGHT)
        self.bends[-1] = False
        for parameter in self.parameters():
            if parameter.dim() < 2:
                nn.init.uniform_(parameter, 0.3, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        for stage, bends in zip(self.stages, self.bends):
            x = self.shake(stage(x))
            x = torch.tanh(x) if bends else x
        return x


def build(program: Program) -> Net:
    """The model with weights of the program's seed, in double precision but of values that its type has."""
    torch.manual_seed(program.seed)
    model = Net(program.stages).to(TYPES[program.dtype]).double()
    for k, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(k not in program.frozen)
    if program.twist == "dead":
        nn.init.zeros_(model.stages[-1].weight)  # type: ignore[arg-type]
    if program.twist == "saturated":
        for module in model.stages:
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) and module.bias is not None:
                nn.init.constant_(module.bias, 50.0)
    return model


def data(program: Program, step: int) -> tuple[Tensor, Tensor]:
    """A step's samples of all ranks, exact in the program's type."""
    generator = torch.Generator().manual_seed(1000 * program.seed + step)
    kind, *sizes = program.given
    n = program.batch * program.chunks * program.ranks
    if kind == "tokens":
        x = torch.randint(sizes[1], (n, sizes[0]), generator=generator)
    else:
        x = twisted(torch.randn(n, *sizes, generator=generator), program.twist).to(TYPES[program.dtype]).double()
    if program.twist == "duplicates":
        x = x[:1].expand_as(x).clone()
    classes = CLASSES if program.stages[-1][0] != "TiedHead" else sizes[1]
    shape = (n, *places_of(program))
    if program.loss == "squared":
        return x, torch.randn(*shape, classes, generator=generator).to(TYPES[program.dtype]).double()
    y = torch.randint(classes, shape, generator=generator)
    if program.twist == "duplicates":
        y = y[:1].expand_as(y).clone()
    if program.loss == "ignoring" and len(shape) > 1:
        y[:, 1::2] = -100
    return x, y


def twisted(x: Tensor, twist: str) -> Tensor:
    """Inputs as a twist has them."""
    scales = {"tiny": 1e-30, "huge": 1e30, "zeros": 0.0}
    return torch.ones_like(x) if twist == "constant" else x * scales.get(twist, 1.0)


def places_of(program: Program) -> tuple[int, ...]:
    """The places of a sample that the model predicts for; () for one prediction a sample."""
    model = build(Program(program.stages, program.given))
    model.eval()
    kind, *sizes = program.given
    x = torch.zeros(2, sizes[0], dtype=torch.long) if kind == "tokens" else torch.zeros(2, *sizes, dtype=torch.float64)
    return tuple(model(x).shape[1:-1])


def loss_of(program: Program, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, int]:
    """(the loss, the model's output, the predictions of which it is made)."""
    output = model(x)
    how = program.settings.get("reduction", "mean")
    wide = output if output.dtype == torch.float64 else output.float()
    if program.loss == "squared":
        value = 0.5 * (wide - y.to(wide)).square().sum(-1)
        return (value.mean() if how == "mean" else value.sum()), output, value.numel()
    labels = y.flatten()
    value = F.cross_entropy(wide.flatten(0, -2), labels, reduction=how)
    return value, output, int((labels >= 0).sum())


KINDS: dict[str, Any] = {
    "kron": natgrad.curvature.Kronecker,
    "eigen": natgrad.curvature.EigenKronecker,
    "unit": natgrad.curvature.UnitWise,
    "full": natgrad.curvature.Full,
    "identity": natgrad.curvature.Identity,
}
COEFFICIENTS = {
    "corrected": natgrad.optim.corrected,
    "tied": natgrad.optim.tied,
    "heavy_ball": natgrad.optim.heavy_ball,
}


@dataclass(frozen=True)
class Same:
    """One curvature for matrices, one for norms, of any kind."""

    matrix: str
    norm: str

    def __call__(self, layer: Layer, samples: int | None, max_size: int) -> Curvature:
        if isinstance(layer, UncurvedParameter):
            return Identity()
        return KINDS[self.norm if isinstance(layer, Norm) else self.matrix](samples)


def blocks_of(program: Program) -> dict[str, str]:
    """Which formula a matrix and a norm have, as the reference calls them."""
    if program.optimizer == "SENG":
        return {"matrix": "rows", "norm": "rows"}
    matrix, norm = program.settings["curvature"]
    return {"matrix": "kron" if matrix == "eigen" else matrix, "norm": norm}


LENGTHS = {"plain": natgrad.plain, "trust": natgrad.trust, "measured": natgrad.optim.measured_change}


def optimizer_of(program: Program, model: Net, world: Any, scaler: Any = None) -> Any:
    """The program's optimizer on a model. A scaler is told to those whose gradients leave early."""
    s = program.settings
    options: dict[str, Any] = {"damping": program.dampings[0], "world": world, "refresh": s["refresh"]}
    options["scaler"] = scaler if program.world.get("overlap") else None
    options |= {"weight_decay": s["weight_decay"], "max_norm": s["max_norm"], "reduction": s["reduction"]}
    if program.optimizer == "SENG":
        options |= {"samples": None, "sketch": None, "columns": s["columns"], "block": s["block"]}
    else:
        matrix, norm = s["curvature"]
        blocks = Same(matrix, norm)
        if matrix in ("kron", "eigen"):
            blocks = LayerBlocks(KINDS[matrix], KINDS[norm])
        options |= {"rows_per_dim": None, "ema_decay": s["ema_decay"], "max_size": s["max_size"]}
        options["preconditioner" if program.optimizer == "NLCG" else "curvature"] = blocks
    if program.optimizer == "NLCG":
        options |= {"beta": getattr(natgrad, s["beta"]), "step": natgrad.Scheduled(feedback=None)}
    else:
        rule = Momentum(s["before"], COEFFICIENTS[s["coefficient"]], decoupled=s["decoupled"])
        length = LENGTHS[s["length"]] if s["length"] in LENGTHS else KLClip(s["limit"])
        options |= {"momentum": s["momentum"], "rule": rule, "length": length, "rescale": s["rescale"]}
    if any(not p.requires_grad for p in model.stages[-1].parameters()):
        # a head that is not watched does not show which predictions there are, nor does a norm over places before it
        x, y = data(program, 0)
        options["predictions"] = loss_of(program, build(program), x, y)[2] / len(x)
    if "directions" in program.ways:
        options["gather"] = "directions"
    if "groups" in program.ways:
        trained = [p for p in model.parameters() if p.requires_grad]
        kinds = [[p for p in trained if (p.dim() < 2) == vectors] for vectors in (False, True)]
        numbers = ({}, {"lr": VECTORS * program.rates[0], "weight_decay": 0.0})
        options["params"] = [{"params": own, **more} for own, more in zip(kinds, numbers) if own]
    return getattr(natgrad, program.optimizer)(model, program.rates[0], **options)


def reference_settings(program: Program) -> dict[str, Any]:
    """The settings as the reference reads them."""
    plain = {"momentum": 0.0, "before": False, "decoupled": True, "coefficient": "corrected", "rescale": None}
    own = {"optimizer": program.optimizer, "chunks": program.chunks * program.ranks, "length": "plain", **plain}
    eigen = program.settings.get("curvature", ("", ""))[0] == "eigen"
    own["vectors"] = VECTORS if "groups" in program.ways else 1.0
    return {**own, "ema_decay": 0.0, "max_size": 8192, **program.settings, "damps_at_once": eigen}


def option(draw: Any, *values: Any) -> Any:
    """One of a few values; the first is the simplest."""
    return draw(st.sampled_from(values))


def vector_stages(draw: Any, size: int, stages: list[Stage]) -> int:
    """Layers on [n, d]; returns the last d."""
    for _ in range(option(draw, 0, 1, 2)):
        kinds = ("Linear", "BatchNorm1d", "Gain", "Again", *(("LayerNorm", "RMSNorm") if size >= LEAST else ()))
        kind = option(draw, *kinds)
        size = linear(draw, size, stages) if kind == "Linear" else size
        if kind == "Again":
            matrices = [(k, options) for k, (name, options) in enumerate(stages) if name == "Linear"]
            square = [k for k, o in matrices if o["in_features"] == o["out_features"] == size]
            if square:
                stages.append(("Again", {"stage": square[-1]}))
        elif kind == "BatchNorm1d":
            stages.append((kind, {"num_features": size, "evaluates": option(draw, True, False)}))
        elif kind == "Gain":
            stages.append((kind, {"size": size}))
        elif kind != "Linear":
            stages.append((kind, {"normalized_shape": size}))
    return size


def linear(draw: Any, size: int, stages: list[Stage]) -> int:
    out = option(draw, size, 2, 5)
    stages.append(("Linear", {"in_features": size, "out_features": out, "bias": option(draw, True, False)}))
    return out


def image_stages(draw: Any, given: tuple[Any, ...], stages: list[Stage]) -> int:
    """Convolutions and norms on [n, c, ...]; returns the last c."""
    _, channels, *size = given
    dims = len(size)
    for _ in range(option(draw, 1, 2)):
        groups = option(draw, 1, 2) if channels % 2 == 0 else 1
        kernel, stride = option(draw, 3, 1, 2), option(draw, 1, 2)
        dilation = option(draw, 1, 2) if kernel > 1 else 1
        padding = option(draw, 1, 0, 2)
        mode = option(draw, "zeros", "circular", "reflect", "replicate")
        if min(size) + 2 * padding < dilation * (kernel - 1) + 1 or (mode != "zeros" and padding >= min(size)):
            padding, mode, dilation, kernel = 0, "zeros", 1, 1
        out = option(draw, 2, 4)
        shape = {"in_channels": channels, "out_channels": out, "kernel_size": kernel, "stride": stride}
        more = {"padding": padding, "dilation": dilation, "groups": groups, "padding_mode": mode}
        stages.append((f"Conv{dims}d", {**shape, **more, "bias": option(draw, True, False)}))
        size = [(n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for n in size]
        channels = out
        kind = option(draw, "", "GroupNorm", "BatchNorm", "InstanceNorm")
        own = math.prod(size)
        if kind == "GroupNorm" and own * channels // 2 >= LEAST:
            stages.append((kind, {"num_groups": option(draw, 1, 2), "num_channels": channels}))
        elif kind == "BatchNorm":
            stages.append((f"BatchNorm{dims}d", {"num_features": channels, "evaluates": option(draw, True, False)}))
        elif kind == "InstanceNorm" and dims == 2 and own >= LEAST:
            stages.append(("InstanceNorm2d", {"num_features": channels, "affine": True}))
    return channels


@st.composite
def networks(draw: Any) -> tuple[tuple[Stage, ...], tuple[Any, ...]]:
    """(stages, what the model is given)."""
    kind = option(draw, "vector", "sequence", "signal", "images", "tokens")
    stages: list[Stage] = []
    if kind == "vector":
        given: tuple[Any, ...] = (kind, option(draw, 3, 1, 4))
        size = vector_stages(draw, given[1], stages)
    elif kind in RUNS:
        given = (kind, option(draw, 2, 1), *[option(draw, 4, 5) for _ in range(RUNS[kind])])
        size = image_stages(draw, given, stages)
        stages.append(("PlacesLast", {}))
        if option(draw, True, False):
            stages.append(("MeanPlaces", {}))
            size = vector_stages(draw, size, stages)
    else:
        given = (kind, option(draw, 3, 2), option(draw, 4, 3))
        size = given[2]
        if kind == "tokens":
            padding = option(draw, None, 0)
            size = 3
            stages.append(("Embedding", {"num_embeddings": given[2], "embedding_dim": size, "padding_idx": padding}))
        if option(draw, False, True):
            stages.append(("LayerNorm", {"normalized_shape": size if option(draw, True, False) else (given[1], size)}))
        for _ in range(option(draw, 0, 1)):
            size = linear(draw, size, stages)
            if option(draw, False, True) and stages[-1][1]["in_features"] == size:
                stages.append(("Again", {"stage": len(stages) - 1}))
        if kind == "tokens" and size == 3 and option(draw, False, True):
            stages.append(("TiedHead", {}))
            return tuple(stages), given
        if option(draw, True, False):
            stages.append(("MeanPlaces", {}))
    stages.append(("Linear", {"in_features": size, "out_features": CLASSES, "bias": option(draw, True, False)}))
    return tuple(stages), given


@st.composite
def programs(draw: Any, types: tuple[str, ...] = tuple(TYPES)) -> Program:
    """Any program whose steps the reference knows."""
    dtype = draw(st.sampled_from(types))
    stages, given = draw(networks())
    optimizer = option(draw, "SPNGD", "KFAC", "SENG", "NLCG")
    settings: dict[str, Any] = {
        "refresh": option(draw, 1, 2),
        "weight_decay": option(draw, 0.0, 0.1),
        "max_norm": option(draw, None, 0.3),
        "reduction": option(draw, "mean", "sum"),
    }
    if optimizer == "SENG":
        settings |= {"columns": option(draw, "empirical", "improved"), "block": option(draw, "layer", "network")}
    else:
        matrix = option(draw, "kron", "eigen", "unit", "full")
        norms = ("unit", "full", "identity") if matrix in ("kron", "eigen") else ("unit", "full")
        settings |= {
            "curvature": (matrix, option(draw, *norms)),
            "ema_decay": option(draw, 0.0, 0.6),
            "max_size": option(draw, 8192, 4),
        }
    if optimizer == "NLCG":
        settings["beta"] = option(draw, "fletcher_reeves", "polak_ribiere")
    else:
        settings |= {
            "momentum": option(draw, 0.0, 0.7),
            "before": option(draw, False, True),
            "decoupled": option(draw, True, False),
            "coefficient": option(draw, *COEFFICIENTS),
            "length": option(draw, "plain", "trust", "kl_clip", "measured"),
            "rescale": option(draw, None, "always", "shrink"),
            "limit": 0.01,
        }
    twist = option(draw, "", "", "", "", *TWISTS[: None if dtype == "float64" else -1])
    trains = any("BatchNorm" in name or name == "InstanceNorm2d" for name, _ in stages)
    if trains and twist in (
        "constant",
        "zeros",
        "duplicates",
    ):  # a norm of equal numbers has gradients of rounding alone
        twist = ""
    if optimizer == "NLCG" and twist == "tiny" and dtype != "float64":
        twist = ""  # A underflows to nothing, and then pi is 1: the decay, which NLCG preconditions, shows it
    if optimizer == "SENG" and twist == "huge":  # in double precision the reference's matrix is singular
        twist = ""
    steps = option(draw, 1, 2, 4)
    rate = option(draw, 0.1, 0.01)
    ranks = option(draw, 1, 2, 3)
    world = option(draw, {}, {"owners": False}, {"overlap": True}) if ranks > 1 else {}
    if ranks == 2:
        world = option(draw, world, {"per_host": 1})
    # batch statistics of one sample: none of a vector, and of images torch 2.13 and 2.14 give wrong gradients on CPUs
    batch = option(draw, 2, 3, 6) if trains else option(draw, 2, 3, 1, 6)
    ways = [way for way in WAYS if option(draw, False, True)]
    if optimizer != "KFAC":
        ways = [way for way in ways if way != "directions"]
    if given[0] != "images":
        ways = [way for way in ways if way != "channels last"]
    if steps == 1:
        ways = [way for way in ways if way != "resumed"]
    count = len(list(build(Program(stages, given)).parameters()))
    frozen = option(draw, (), (draw(st.integers(0, count - 1)),))
    return Program(
        stages,
        given,
        option(draw, "cross_entropy", "squared", "ignoring"),
        optimizer,
        settings,
        tuple(rate * option(draw, 1.0, 0.5) for _ in range(steps)),
        tuple(option(draw, 0.1, 0.01) * option(draw, 1.0, 3.0) for _ in range(steps)),
        batch,
        option(draw, 1, 2),
        ranks,
        world,
        dtype,
        () if count == 1 or "channels last" in ways else frozen,  # torch 2.13 ends with a segmentation fault there
        tuple(ways),
        twist,
        draw(st.integers(0, 99)),
    )
