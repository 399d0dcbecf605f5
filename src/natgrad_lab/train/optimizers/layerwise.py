"""LARS and LAMB: first-order steps as long as a share of each layer's weights, as pytorch_optimizer has them."""

from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from natgrad.parallel import World
from natgrad_lab.train.optimizers.settings import Settings, alone, positive


@dataclass(frozen=True)
class Lars(Settings):
    """LARS (You et al. 2017): SGD whose step in each matrix is trust x lr x the matrix's norm; vectors take SGD's."""

    lr: float = 10.0
    """Learning rate at the start; the schedule multiplies it."""
    momentum: float = 0.9
    """Share of the last step that is repeated."""
    nesterov: bool = False
    """Look ahead along the momentum before measuring the gradient's effect."""
    weight_decay: float = 0.0
    """Strength of the L2 penalty on matrices."""
    trust: float = 1e-3
    """Length of a step over the norm of the weights, at learning rate 1 (the paper's eta)."""
    vectors: float = 0.01
    """Learning rate of biases and norms, as a share of lr: LARS leaves them to SGD, whose scale is another."""

    def build(self, model: nn.Module, world: World) -> Optimizer:
        from pytorch_optimizer import LARS

        for name in ("lr", "trust", "vectors"):
            positive(name, getattr(self, name))
        matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
        vectors = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
        groups = [{"params": matrices}, {"params": vectors, "lr": self.lr * self.vectors}]
        optimizer = LARS(
            [group for group in groups if group["params"]],
            self.lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            nesterov=self.nesterov,
            trust_coefficient=self.trust,
        )
        return alone(optimizer, model, world)


@dataclass(frozen=True)
class Lamb(Settings):
    """LAMB (You et al. 2019, version 3): Adam's step in each tensor, brought to lr x the tensor's norm."""

    lr: float = 0.02
    """Learning rate at the start; the schedule multiplies it."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the averages of the gradient and of its square."""
    weight_decay: float = 0.0
    """Strength of the decoupled weight decay."""

    def build(self, model: nn.Module, world: World) -> Optimizer:
        import pytorch_optimizer

        positive("lr", self.lr)
        given = {"betas": self.betas, "weight_decay": self.weight_decay}
        # adam_debias: without it the library divides the learning rate by 1 - beta1^t, tenfold in the first step
        optimizer = pytorch_optimizer.Lamb(model.parameters(), self.lr, adam_debias=True, **given)
        return alone(optimizer, model, world)
