"""A physics-informed network: what natgrad refuses, and the same network written so that its curvature is exact.

The network solves u'' = f on (0, 1) with u(0) = u(1) = 0, where f = -pi^2 sin(pi x) - 8 pi^2 sin(4 pi x).

One learns: `torch.autograd.grad(..., create_graph=True)` puts derivatives of the network into the loss. Hooks cannot
follow the second backward pass, so natgrad refuses the step. A forward pass that carries h, h' and h'' along needs
no second pass: each weight is used three times, natgrad adds the uses up, and every weight has its own curvature. A
squared residual has no labels, so `fisher="sampled"` draws them from the normal distribution of which the loss is
the likelihood.

It prints: the refusal; the loss and the largest error |u - exact| of Adam, which gets five times the steps (about
the same seconds), and of NLCG on Kronecker factors, whose curvature step needs no learning rate; the coverage.
"""

import argparse
import math

import torch
from torch import nn
from torch.nn import functional as F

import natgrad
from natgrad.optim import polak_ribiere


class Network(nn.Module):
    """x [n, 1] -> u and u'', [n, 1] each. u = x (1 - x) h vanishes at 0 and 1."""

    def __init__(self, width=32):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1, width), nn.Linear(width, width), nn.Linear(width, 1)])

    def forward(self, x):
        h, d, dd = x, torch.ones_like(x), torch.zeros_like(x)  # h, its first and its second derivative by x
        for layer in self.layers:
            if layer is not self.layers[0]:
                h = torch.tanh(h)
                slope = 1 - h * h
                d, dd = slope * d, slope * dd - 2 * h * slope * d * d
            h, d, dd = layer(h), F.linear(d, layer.weight), F.linear(dd, layer.weight)
        w, dw = x * (1 - x), 1 - 2 * x
        return w * h, w * dd + 2 * dw * d - 2 * h


def refusal(x, f):
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    optimizer = natgrad.KFAC(model, lr=0.1)
    x = x.clone().requires_grad_()
    (du,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
    (ddu - f).square().mean().backward()
    try:
        optimizer.step()
    except ValueError as error:
        print("refused:", error)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args(argv)
    x = (torch.arange(256, dtype=torch.float64) + 0.5)[:, None] / 256
    first, second = torch.sin(math.pi * x), 0.5 * torch.sin(4 * math.pi * x)
    f = -(math.pi**2) * (first + 16 * second)
    scale = f.square().mean().sqrt()  # the normal distribution of the loss has variance 1
    refusal(x, f)
    for name, steps in (("Adam", 5 * args.steps), ("NLCG", args.steps)):
        torch.manual_seed(1)
        model = Network().double()

        def residual(model=model):
            return (model(x)[1] - f) / scale

        optimizer, more = torch.optim.Adam(model.parameters(), lr=0.01), {}
        if name == "NLCG":
            curved = {"preconditioner": natgrad.kfac_blocks, "step": natgrad.CurvatureStep(output="squared")}
            optimizer = natgrad.NLCG(model, **curved, beta=polak_ribiere, fisher="sampled")
            more = {"forward": residual}
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            output = residual()
            loss = 0.5 * output.square().mean()
            if name == "NLCG":
                optimizer.sample(output, "normal")
            loss.backward()
            optimizer.step(**more)
            schedule.step()
            optimizer.zero_grad()
        error = (model(x)[0] - first - second).abs().max()
        print(f"{name}: {steps} steps, loss {loss:.1e}, largest error {error:.3f}")
    print(optimizer.coverage())


if __name__ == "__main__":
    main()
