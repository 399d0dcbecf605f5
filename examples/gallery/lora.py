"""LoRA: a frozen network with low-rank adapters, written in a few lines.

A small transformer learns python's help topics. Then its weights are frozen, and adapters learn the source of some
modules.

One learns: an adapter is two linear layers, so both have Kronecker factors, one side of which is only as wide as the
rank. Weights that are frozen when the optimizer is built have no state. B is zero at first, so A has no gradient in
the first step; both train from the second one on. PEFT's adapters work the same way: `model = get_peft_model(model,
LoraConfig(...))`, then `natgrad.SPNGD(model, lr=0.1)`.

It prints: how many weights train, the loss of held-out source before and after the adapters' steps, and the table of
layers.
"""

import argparse
import inspect
import typing

import torch
from torch import nn
from torch.nn import functional as F

import natgrad
from natgrad_lab.data import text as texts
from natgrad_lab.models import Transformer


class LoRA(nn.Module):
    """y = W x + B A x with W frozen (Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(self, linear, rank):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


def adapt(model, rank):
    model.requires_grad_(False)
    for block in model.blocks:
        for name in ("query", "value", "grow", "shrink"):
            setattr(block, name, LoRA(getattr(block, name), rank))


def text():
    """Windows of 64 characters: of the help topics, and of some modules' source."""
    topics = texts.topics()[0]
    source = "\n".join(inspect.getsource(module) for module in (argparse, inspect, typing))
    order = texts.frequent(topics + source, 96)
    return [texts.windows(one, order, 64).long() for one in (topics, source)]


def characters():
    return Transformer(blocks=2, width=64).build((1, 1, 64), 96)


def loss_of(model, windows):
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def train(model, optimizer, windows, steps, batch):
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss_of(model, windows[torch.randint(len(windows), (batch,))]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=128, help="texts of 64 characters")
    parser.add_argument("--rank", type=int, default=4)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    topics, source = text()
    held_out, source = source[::10], source[torch.arange(len(source)) % 10 > 0]
    model = characters()
    train(model, natgrad.SPNGD(model, lr=0.1), topics, args.steps, args.batch)
    adapt(model, args.rank)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{count:,} of {sum(p.numel() for p in model.parameters()):,} weights train")
    with torch.no_grad():
        before = loss_of(model, held_out)
    optimizer = natgrad.SPNGD(model, lr=0.1)
    train(model, optimizer, source, args.steps, args.batch)
    with torch.no_grad():
        print(f"loss of source held out: {before:.3f} -> {loss_of(model, held_out):.3f}")
    print(optimizer.coverage())


if __name__ == "__main__":
    main()
