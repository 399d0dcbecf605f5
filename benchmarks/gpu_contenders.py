"""What `gpu.py` compares: networks with a batch for each, and optimizers in the variants that this natgrad has."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import natgrad
from natgrad.parallel import World
from natgrad_lab.models import ImageResNet, Transformer
from natgrad_lab.train.optimizers import Muon

NEVER = 10**9
SHARE = 0.05  # of a step that measuring and factoring may take under a budget
KINDS: dict[str, dict[str, Any]] = {
    "SPNGD": {"lr": 3e-3},
    "KFAC": {"lr": 3e-3},
    "SENG": {"lr": 3e-3},
    "NLCG": {"lr": 3e-3},
}
"""Our optimizers, with a learning rate at which the loss of one batch falls from the first steps on."""


@dataclass(frozen=True)
class Network:
    """A network, and how to make one batch for it on a device."""

    name: str
    unit: str
    """What a batch is counted in."""
    build: Callable[[], nn.Module]
    batch: Callable[[int, torch.device], tuple[Tensor, Tensor]]
    images: bool = False
    """The weights and the images are channels_last in memory."""

    def made(self, device: torch.device, seed: int) -> nn.Module:
        """The network with its first weights, the same for every contender."""
        torch.manual_seed(seed)
        with device:  # 124 million weights are drawn much faster on a GPU
            model = self.build()
        return model.to(memory_format=torch.channels_last) if self.images else model  # type: ignore[call-overload]

    def data(self, size: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
        """The one batch on which every step is taken."""
        torch.manual_seed(seed + 1)
        return self.batch(size, device)


def images(side: int, classes: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Noise with a label each."""
    x = torch.randn(size, 3, side, side, device=device).to(memory_format=torch.channels_last)
    return x, torch.randint(classes, (size,), device=device)


def texts(places: int, words: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sequences in which every word follows from the one before: next = 31 word + 7 modulo a prime."""
    prime = 97 if words > 97 else 23
    tokens = [torch.randint(prime, (size,), device=device)]
    for _ in range(places):
        tokens.append((31 * tokens[-1] + 7) % prime)
    text = torch.stack(tokens, 1)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


RESNET = Network(
    "ResNet-50",
    "images",
    lambda: ImageResNet(50).build((3, 224, 224), 1000),
    partial(images, 224, 1000),
    images=True,
)
GPT = Network(
    "transformer of GPT-2's small size",
    "texts of 1,024 words",
    lambda: Transformer(blocks=12, width=768, heads=12, tied=True).build((1, 1, 1024), 50304),
    partial(texts, 1024, 50304),
)
SMALL_RESNET = Network(
    "ResNet-18, narrow",
    "images",
    lambda: ImageResNet(18, width=4).build((3, 32, 32), 10),
    partial(images, 32, 10),
    images=True,
)
SMALL_GPT = Network(
    "transformer, narrow",
    "texts of 8 words",
    lambda: Transformer(blocks=2, width=16, tied=True).build((1, 1, 8), 32),
    partial(texts, 8, 32),
)


@dataclass(frozen=True)
class Contender:
    """An optimizer in one variant.

    absent: why this natgrad or this device does not have it. optional: the optimizer may refuse the variant, which is
    no failure. warm: steps before its time is taken; in its first 8 measurements a layer has checksums, later in one
    of 8.
    """

    name: str
    build: Callable[[nn.Module], Optimizer]
    absent: str = ""
    optional: bool = False
    warm: int = 4


def fused(kind: Callable[..., Optimizer], model: nn.Module, **options: Any) -> Optimizer:
    """One of torch's optimizers as a single kernel."""
    return kind(model.parameters(), fused=True, **options)


def muon(model: nn.Module) -> Optimizer:
    """torch.optim.Muon for the hidden matrices, AdamW for the rest."""
    return Muon(lr=0.01, rest_lr=1e-3).build(model, World.alone())


SGD = Contender("SGD(fused)", lambda m: fused(torch.optim.SGD, m, lr=0.01, momentum=0.9, weight_decay=1e-4))
BASELINES = [
    Contender("AdamW(fused)", lambda m: fused(torch.optim.AdamW, m, lr=3e-4, weight_decay=1e-2)),
    Contender("Muon", muon),
]


def contenders(device: torch.device) -> list[Contender]:
    """Everything that is compared with SGD, in the order of its worth. SGD beside itself shows the noise."""
    graph = "" if device.type == "cuda" else "a CUDA graph needs a GPU"
    budget = "" if hasattr(natgrad, "Budget") else "this natgrad has no Budget"
    found: dict[str, list[Contender]] = {"plain": [], "graph": [], "stale": [], "budget": []}
    for name, options in KINDS.items():
        kind = getattr(natgrad, name)
        build = partial(made, kind, options)
        no_graph = "" if takes(kind, "graph") else f"{name} of this natgrad takes no graph="
        plain = {"refresh": NEVER} if name != "NLCG" else {}
        found["plain"].append(Contender(f"{name}, plain", partial(build, plain)))
        with_graph = partial(build, {**plain, "graph": True})
        found["graph"].append(Contender(f"{name}, plain, CUDA graph", with_graph, no_graph or graph, optional=True))
        if name == "NLCG":  # it measures nothing: all its steps are plain
            continue
        found["stale"].append(Contender(f"{name}, all stale", partial(build, {"refresh": 1}), warm=10))
        refresh = partial(budgeted, build)
        found["budget"].append(Contender(f"{name}, all stale, budgeted", refresh, budget, optional=True, warm=10))
    return [SGD, BASELINES[0], *found["plain"], *found["graph"], *found["stale"], *found["budget"], BASELINES[1]]


def made(kind: Callable[..., Optimizer], options: dict[str, Any], more: dict[str, Any], model: nn.Module) -> Optimizer:
    """One of our optimizers."""
    return kind(model, **options, **more)


def budgeted(build: Callable[[dict[str, Any], nn.Module], Optimizer], model: nn.Module) -> Optimizer:
    """Everything is always due, and the budget alone says how much of it is done in a step."""
    budget: Any = natgrad.Budget  # type: ignore[attr-defined]
    return build({"refresh": budget(share=SHARE, then=natgrad.Every(1))}, model)


def takes(kind: type, name: str) -> bool:
    """Whether a class has an argument of this name, its own or its parents'."""
    return any(name in inspect.signature(base.__init__).parameters for base in kind.__mro__ if "__init__" in vars(base))
