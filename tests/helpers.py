"""What the engine's tests share: small models, a training loop, and the classes that are to be found."""

import copy
import gc
import warnings
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

import natgrad
from natgrad.curvature import Curvature
from natgrad.curvature.curvature import RowSum
from natgrad.optim import SecondOrder


def subclasses(base):
    """Every concrete subclass of `base`, at any depth, in the package."""
    found = []
    for child in base.__subclasses__():
        found += subclasses(child)
        if child.__module__.startswith("natgrad.") and not getattr(child, "__abstractmethods__", None):
            found.append(child)
    return list(dict.fromkeys(found))


OPTIMIZERS = [kind for kind in subclasses(SecondOrder) if kind is not natgrad.Preconditioner]  # it leaves weights alone


def made(kind, model, **options):
    """An optimizer of any kind with what it has of these options; columns of samples have no age to adapt to.

    NLCG has a curvature here, as the others do; test_nlcg.py has those that learn from mean gradients.
    """
    if kind is natgrad.NLCG:
        options = {k: v for k, v in options.items() if k != "momentum"}
        blocks = options.pop("curvature", natgrad.spngd_blocks)
        options = {"preconditioner": blocks, "step": natgrad.Scheduled(feedback=None), **options}
    if kind is natgrad.SENG:
        options = {k: v for k, v in options.items() if k not in ("ema_decay", "curvature")}
        if "rows_per_dim" in options:
            options["samples"] = options.pop("rows_per_dim")
        if isinstance(options.get("refresh"), natgrad.Adaptive):
            options["refresh"] = 3
    return kind(model, **options)


CURVATURES = subclasses(Curvature)


class Opaque(torch.autograd.Function):
    """A product that is no function of torch."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy @ weight, dy.T @ x


class Mixed(nn.Module):
    """An embedding, a convolution, norms, a linear layer and a loose parameter; no layer looks across samples."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.conv = nn.Conv1d(6, 4, 3, stride=2, padding=1)
        self.group = nn.GroupNorm(2, 4)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 4).unsqueeze(1))
        self.head = nn.Linear(12, 3)

    def forward(self, tokens):
        hidden = torch.tanh(self.conv(self.norm(self.embed(tokens)).transpose(1, 2)))
        return self.head((self.group(hidden) * self.gain).flatten(1))

    @staticmethod
    def batch(n, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(7, (n, 6), generator=generator), torch.randint(3, (n,), generator=generator)


class Net(nn.Module):
    """A small network without loose parameters or cross-sample layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).flatten(1))

    @staticmethod
    def batch(n, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, 2, 4, 4, generator=generator, dtype=torch.float64)
        return x, torch.randint(3, (n,), generator=generator)


class Two(nn.Module):
    """A body and a head; subclasses say how they use them."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def mlp(bias=True):
    return nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias))


def points(n, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (n,), generator=generator)


def backward(model, batch, **options):
    """The gradient of the cross entropy of a batch; returns the loss."""
    x, y = batch
    loss = F.cross_entropy(model(x).float() if x.dtype == torch.bfloat16 else model(x), y, **options)
    loss.backward()
    return loss.detach()


def train(optimizer, model, batches, tell=False):
    """One step a batch; returns the losses. tell: the optimizer is told them, if it listens."""
    losses = []
    for batch in batches:
        losses.append(float(backward(model, batch)))
        optimizer.step(loss=losses[-1]) if tell and optimizer.hears_loss else optimizer.step()
        optimizer.zero_grad()
    return losses


def weights(model):
    """All parameters as one vector, a copy."""
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def clone(model):
    """A copy that shares nothing."""
    return copy.deepcopy(model)


def hooks(model):
    """How many forward hooks a model has."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def row(optimizer, name):
    """What coverage() says of the layer or parameter `name`."""
    return next(r for r in optimizer.coverage() if r.layer == name)


def statistic(optimizer, name, key):
    """A statistic of the layer `name`."""
    cell = next(c for c in optimizer.cells if c.name == name)
    return cell.square(key)


def measured(moment, layer, x, dy, draw, output=None):
    """The part of one call of a layer, a sum over its rows or samples."""
    part = moment.after(layer, moment.before(layer, x, draw, output), dy, draw)
    return moment.close([part.total if isinstance(part, RowSum) else part])


def quiet(build, *args, **options):
    """Call with natgrad's warnings off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", natgrad.NatgradWarning)
        return build(*args, **options)


@contextmanager
def unwarned():
    """natgrad has nothing to warn of here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", natgrad.NatgradWarning)
        yield


@contextmanager
def heard():
    """A list that has natgrad's warnings at the end."""
    said = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [w for w in caught if issubclass(w.category, natgrad.NatgradWarning)]


def said_by(call, *args):
    """What natgrad warns of in a call, as texts."""
    with heard() as said:
        call(*args)
    return [str(w.message) for w in said]


def forget():
    """Let dropped optimizers take their hooks with them."""
    gc.collect()
