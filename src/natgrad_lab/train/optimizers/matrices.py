"""Muon, Shampoo, SOAP and DASH: optimizers of matrices, which see a convolution as [out, in x height x width]."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from natgrad.parallel import World
from natgrad_lab.train.optimizers.settings import Settings, alone, positive

GRAFTS = {"sgd": 1, "rmsprop": 3}
Make = Callable[[list[nn.Parameter]], Optimizer]


class Flattened(Optimizer):
    """One optimizer made of several, each on parameters of its own, every one of them as a matrix or a vector.

    parts: (parameters, how to make an optimizer of their views). Numbers and state are held here, under the real
    parameters, so schedules and checkpoints see an ordinary optimizer.
    """

    def __init__(self, parts: list[tuple[list[nn.Parameter], Make]]) -> None:
        self.inner = [make([_view(p) for p in parameters]) for parameters, make in parts if parameters]
        kept = [parameters for parameters, _ in parts if parameters]
        groups = [{**inner.param_groups[0], "params": p} for inner, p in zip(self.inner, kept)]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Let each part take its step."""
        if closure is not None:
            raise ValueError("these optimizers take no closure; call backward() first")
        for inner, group in zip(self.inner, self.param_groups):
            views = inner.param_groups[0]["params"]
            for parameter, view in zip(group["params"], views):
                view.grad = None if parameter.grad is None else _matrix(parameter.grad, parameter).reshape(view.shape)
                inner.state[view] = self.state[parameter]
            inner.param_groups[0].update(_numbers(group))
            inner.step()
            group.update(_numbers(inner.param_groups[0]))
            for parameter, view in zip(group["params"], views):
                self.state[parameter] = inner.state[view]
                view.grad = None


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _view(parameter: nn.Parameter) -> nn.Parameter:
    """The same memory as a parameter of at most two dimensions."""
    flat = _matrix(parameter.detach(), parameter)
    if flat.data_ptr() != parameter.data_ptr():
        raise ValueError(
            f"a weight of shape {tuple(parameter.shape)} has strides {parameter.stride()}, which are no matrix's; "
            "make it contiguous"
        )
    return nn.Parameter(flat)


def _matrix(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return a tensor of the parameter's shape as [out, columns], the columns in the order of the parameter's memory.

    In channels_last memory the columns are [height, width, in]. The order of the columns changes no step but for the
    blocks into which Shampoo and DASH cut a side that is above their block size.
    """
    if tensor.dim() <= 2:
        return tensor
    if not parameter.is_contiguous():
        tensor = tensor.movedim(1, -1)
    return tensor.flatten(1)


def hidden_matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(what Muon is for, the rest): weights of two and more dimensions, save embeddings and the last linear layer."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    apart = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | {id(m.weight) for m in last}
    trained = [p for p in model.parameters() if p.requires_grad]
    chosen = [p for p in trained if p.dim() >= 2 and id(p) not in apart]
    taken = {id(p) for p in chosen}
    return chosen, [p for p in trained if id(p) not in taken]


@dataclass(frozen=True)
class Muon(Settings):
    """Muon (Jordan 2024, torch.optim.Muon) for hidden matrices, AdamW for embeddings, norms, biases and the output."""

    lr: float = 0.05
    """Learning rate of the matrices at the start; the schedule multiplies it."""
    rest_lr: float = 0.01
    """AdamW's learning rate, for the rest."""
    momentum: float = 0.95
    """Share of the last average of gradients that is kept."""
    weight_decay: float = 0.0
    """Strength of the decoupled weight decay, for both."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decays."""
    lr_scale: Literal["original", "match_rms_adamw"] = "original"
    """How a step's size follows a matrix's shape: sqrt(max(1, rows / columns)), or 0.2 sqrt(max(rows, columns))."""

    def build(self, model: nn.Module, world: World) -> Optimizer:
        positive("lr", self.lr)
        positive("rest_lr", self.rest_lr)
        hidden, rest = hidden_matrices(model)
        return alone(Flattened([(hidden, self._muon), (rest, self._adamw)]), model, world)

    def _muon(self, parameters: list[nn.Parameter]) -> Optimizer:
        given = {"momentum": self.momentum, "weight_decay": self.weight_decay, "adjust_lr_fn": self.lr_scale}
        return torch.optim.Muon(parameters, self.lr, **given)

    def _adamw(self, parameters: list[nn.Parameter]) -> Optimizer:
        return torch.optim.AdamW(parameters, self.rest_lr, betas=self.betas, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Shampoo(Settings):
    """Shampoo (Gupta et al. 2018) with grafted lengths, after Google's distributed one (Anil et al. 2020)."""

    lr: float = 0.1
    """Learning rate at the start; the schedule multiplies it."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Momentum, and decay of the statistics."""
    weight_decay: float = 0.0
    """Strength of the weight decay."""
    every: int = 5
    """Steps between two computations of the roots (1,000 in the library, which is for long runs)."""
    damping: float = 1e-6
    """Added to the statistics, relative to their largest eigenvalue."""
    graft: Literal["sgd", "rmsprop"] = "sgd"
    """Whose step gives the length in each layer."""
    block: int = 1024
    """Sides above this are cut into blocks."""

    def build(self, model: nn.Module, world: World) -> Optimizer:
        positive("lr", self.lr)
        return alone(Flattened([(_trained(model), self._make)]), model, world)

    def _make(self, parameters: list[nn.Parameter]) -> Optimizer:
        from pytorch_optimizer import ScalableShampoo

        return ScalableShampoo(
            parameters,
            self.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            start_preconditioning_step=1,
            preconditioning_compute_steps=self.every,
            block_size=self.block,
            shape_interpretation=False,
            graft_type=GRAFTS[self.graft],
            matrix_eps=self.damping,
        )


@dataclass(frozen=True)
class Soap(Settings):
    """SOAP (Vyas et al. 2024): Adam in Shampoo's eigenbasis. Its first step only measures, as the authors' does."""

    lr: float = 0.02
    """Learning rate at the start; the schedule multiplies it."""
    betas: tuple[float, float] = (0.95, 0.95)
    """Decay of the averages of the gradient and of its square; the second also of the statistics."""
    weight_decay: float = 0.0
    """Strength of the decoupled weight decay."""
    every: int = 10
    """Steps between two turns of the eigenbasis."""
    max_size: int = 10000
    """Sides above this are left as they are."""

    def build(self, model: nn.Module, world: World) -> Optimizer:
        positive("lr", self.lr)
        return alone(Flattened([(_trained(model), self._make)]), model, world)

    def _make(self, parameters: list[nn.Parameter]) -> Optimizer:
        from pytorch_optimizer import SOAP

        return SOAP(
            parameters,
            self.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            precondition_frequency=self.every,
            max_precondition_dim=self.max_size,
        )


@dataclass(frozen=True)
class Dash(Settings):
    """DASH (arXiv:2602.02016): Shampoo's direction in blocks, each at the length of Adam's step there.

    Roots are by eigenvectors: the library's Newton iterations begin with random vectors, which differ between ranks.
    """

    lr: float = 0.01
    """Learning rate at the start; the schedule multiplies it."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the averages of the gradient and of its square; the second also of the statistics."""
    weight_decay: float = 0.0
    """Strength of the decoupled weight decay."""
    every: int = 5
    """Steps between two computations of the roots (10 in the library, which is for longer runs)."""
    damping: float = 1e-10
    """Added to the statistics' diagonals."""
    block: int = 1024
    """Sides above this are cut into blocks."""

    def build(self, model: nn.Module, world: World) -> Optimizer:
        positive("lr", self.lr)
        positive("damping", self.damping)
        return alone(Flattened([(_trained(model), self._make)]), model, world)

    def _make(self, parameters: list[nn.Parameter]) -> Optimizer:
        from pytorch_optimizer import DASH

        return DASH(
            parameters,
            self.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            precondition_frequency=self.every,
            block_size=self.block,
            matrix_eps=self.damping,
            inverse_root_method="eigh",
        )


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
