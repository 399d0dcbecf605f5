"""Fine-tuning: a frozen backbone, a new head, then everything, with one optimizer from the beginning to the end.

A network learns the digits 0 to 4, gets a new head, and learns the digits 5 to 9 from 200 images of them.

One learns: natgrad takes only parameters that train; what is frozen when the optimizer is built costs nothing.
Parameters that are unfrozen join by `add_param_group` with a learning rate of their own, and have curvature from the
next step on. A pretrained BatchNorm is also put into `eval()`, else its running statistics move. Pretrained weights
want a low learning rate (0.03 is too high here), and no `rescale=`, which would bring them to the norm of an
initialisation.

It prints: layers with curvature and test accuracy after the head's steps, and after as many steps of everything; for
comparison test accuracy of the same steps from scratch.
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F

import natgrad
from natgrad_lab.data import Digits


def body():
    def block(i, o):
        return [nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]

    return nn.Sequential(*block(1, 16), *block(16, 32), nn.Flatten())


def with_head(backbone):
    return nn.Sequential(backbone, nn.Linear(128, 5))


def images_of(split, low):
    images, labels = split.batch(torch.arange(len(split)))
    chosen = (labels >= low) & (labels < low + 5)
    return images[chosen], labels[chosen] - low


def train(model, optimizer, data, steps):
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        F.cross_entropy(model(data[0]), data[1], label_smoothing=0.1).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model, data):
    was = {module: module.training for module in model.modules()}
    right = (model.eval()(data[0]).argmax(1) == data[1]).double().mean().item()
    for module, training in was.items():
        module.training = training
    return f"{100 * right:.1f} %"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(argv)
    splits = Digits().load()
    before, after, test = images_of(splits.train, 0), images_of(splits.train, 5), images_of(splits.test, 5)
    few = (after[0][:200], after[1][:200])
    torch.manual_seed(0)
    backbone = body()
    pretrained = with_head(backbone)
    train(pretrained, natgrad.SPNGD(pretrained, lr=0.1), before, args.steps)

    model = with_head(backbone)
    backbone.requires_grad_(False).eval()
    optimizer = natgrad.SPNGD(model, lr=0.1)
    train(model, optimizer, few, args.steps)
    print(f"head alone: {optimizer.preconditioned.layers} layer(s) with curvature, {accuracy(model, test)}")

    backbone.requires_grad_(True)
    optimizer.param_groups[0].update(lr=0.01, initial_lr=0.01)  # torch's schedules begin at initial_lr where it is set
    optimizer.add_param_group({"params": backbone.parameters(), "lr": 0.01})
    train(model, optimizer, few, args.steps)
    print(f"everything: {optimizer.preconditioned.layers} layers with curvature, {accuracy(model, test)}")

    scratch = with_head(body())
    train(scratch, natgrad.SPNGD(scratch, lr=0.1), few, 2 * args.steps)
    print(f"from scratch: {accuracy(scratch, test)}")


if __name__ == "__main__":
    main()
