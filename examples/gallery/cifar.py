"""CIFAR-100 on two ranks: SP-NGD beside SGD with Nesterov momentum, both on a large batch and for the same steps.

    torchrun --nproc-per-node 2 examples/gallery/cifar.py --data data/cifar100

One learns: a loop on several ranks needs `init_process_group` and each rank's share of a batch, nothing else.
natgrad averages gradients itself, so the model stays unwrapped; SGD has DistributedDataParallel. `--data` is a
folder of CIFAR-100's parquet files (the ten first classes are taken, at 16x16). Without `--data` the script says so
and takes scikit-learn's digits.

It prints, from rank 0: test accuracy of both every fifth of the steps, and milliseconds a step.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import natgrad
from natgrad_lab.data import Cifar100, Digits
from natgrad_lab.models import CifarResNet


def accuracy(model, test, device):
    model.eval()
    with torch.no_grad():
        images, labels = test.batch(torch.arange(len(test)))
        right = (model(images.to(device)).argmax(1) == labels.to(device)).double().mean()
    model.train()
    if dist.is_initialized():  # BatchNorm's running statistics are each rank's own, so accuracies differ a little
        dist.all_reduce(right)
        right /= dist.get_world_size()
    return 100 * right.item()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a folder of CIFAR-100's parquet files")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=1000, help="images of a step, of all ranks together")
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    source = Cifar100(path=args.data, size=16, keep_classes=10) if args.data else Digits()
    if not args.data and rank == 0:
        print("no --data, so scikit-learn's digits instead of CIFAR-100")
    splits = source.load()
    for name in ("Nesterov", "SPNGD"):
        torch.manual_seed(0)
        model = CifarResNet(depth=8).build(source.shape(), source.classes()).to(device)
        if name == "SPNGD":
            optimizer = natgrad.SPNGD(model, lr=0.1)
        else:
            model = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
        order, spent, told = torch.Generator().manual_seed(0), 0.0, []
        draws = torch.Generator().manual_seed(rank)  # shifts and mirrors
        for step in range(1, args.steps + 1):
            mine = torch.randint(len(splits.train), (args.batch,), generator=order)[rank::ranks]
            images, labels = splits.augment(splits.train.batch(mine)[0], draws), splits.train.batch(mine)[1]
            begun = time.perf_counter()
            F.cross_entropy(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            spent += time.perf_counter() - begun
            if step % max(1, args.steps // 5) == 0:
                told.append(f"{accuracy(model, splits.test, device):.1f}")
        if rank == 0:
            print(f"{name}, {ranks} ranks: {' '.join(told)} %, {1000 * spent / args.steps:.0f} ms a step")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
