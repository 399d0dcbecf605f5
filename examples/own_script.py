"""A complete training script of one's own, on one process, on many, or on many hosts (docs/many-nodes.md explains it).

    python examples/own_script.py --out runs/own
    torchrun --nproc-per-node 2 examples/own_script.py --out runs/own
    sbatch --nodes 8 examples/slurm.sbatch examples/own_script.py --out /shared/runs/own

The script goes on from the newest whole checkpoint in --out, so the same line starts a run and resumes it.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler, TensorDataset

import natgrad

STOP = []
"""Signals that have asked this process to end."""


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and log.jsonl, for all hosts")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=240, help="samples of a step, of all ranks together")
    parser.add_argument("--micro-batch", type=int, help="samples that pass through the network at once on a rank")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=1e-3, help="of matrices; vectors do not decay")
    parser.add_argument("--warm-up", type=int, default=3, help="steps in which the learning rate rises")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--save-every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--workers", type=int, default=0, help="processes that read data")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def join():
    """This process's rank, the number of ranks and the device: alone, or as torchrun's variables say."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return 0, 1, device
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=10))  # before the optimizer is built
    return dist.get_rank(), dist.get_world_size(), device


def data():
    """scikit-learn's digits: 1,437 images for training and 360 for the test."""
    pixels, labels = load_digits(return_X_y=True)
    images = (torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) - 4.88) / 6.02
    test = torch.arange(len(images)) % 5 == 0
    labels = torch.tensor(labels)
    return TensorDataset(images[~test], labels[~test]), TensorDataset(images[test], labels[test])


def network():
    def block(i, o, stride):
        return [nn.Conv2d(i, o, 3, stride, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]

    body = [*block(1, 16, 1), *block(16, 32, 2), *block(32, 64, 2)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, 10))


class Batches(Sampler):
    """This rank's share of every batch from a step on. A batch follows from seed and step, on any number of ranks."""

    def __init__(self, samples, batch, rank, ranks, seed, first, steps):
        if batch % ranks or not ranks <= batch <= samples:
            raise ValueError(f"a batch of {batch} does not divide by {ranks} ranks, or exceeds {samples} samples")
        self.samples, self.batch, self.rank, self.ranks = samples, batch, rank, ranks
        self.seed, self.first, self.steps = seed, first, steps

    def __len__(self):
        return self.steps - self.first

    def __iter__(self):
        for step in range(self.first, self.steps):
            epoch, place = divmod(step, self.samples // self.batch)
            order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(self.seed + epoch))
            yield order[place * self.batch : (place + 1) * self.batch][self.rank :: self.ranks].tolist()


def total(*numbers, device):
    """Sums over ranks, as numbers."""
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


def average_buffers(model):
    """BatchNorm's running statistics are each rank's own until somebody averages them."""
    if dist.is_initialized():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= dist.get_world_size()


@torch.no_grad()
def evaluate(model, test, rank, ranks, device):
    """Loss and accuracy on the test set, of which every rank takes its share."""
    model.eval()
    images, labels = (tensor[rank::ranks].to(device) for tensor in test.tensors)
    output = model(images)
    model.train()
    right, loss = (output.argmax(1) == labels).sum(), F.cross_entropy(output, labels, reduction="sum")
    right, loss, samples = total(right, loss, len(labels), device=device)
    return {"test loss": loss / samples, "test accuracy": right / samples}


def save(folder, step, model, optimizer, schedule, rank):
    """All ranks write what they hold; the table of contents (.metadata) comes last: with it a checkpoint is whole."""
    weights, state = get_state_dict(model, optimizer)
    parts = {"model": weights, "optimizer": state, "schedule": schedule.state_dict()}
    dcp.save(parts, checkpoint_id=folder / f"step-{step:08d}", no_dist=not dist.is_initialized())
    if rank == 0:
        for old in sorted(folder.glob("step-*"))[:-2]:
            shutil.rmtree(old)


def load(folder, model, optimizer, schedule):
    """The step of the newest whole checkpoint, whose state is taken over; 0 where there is none."""
    found = sorted(path.parent for path in folder.glob("step-*/.metadata"))
    if not found:
        return 0
    weights, state = get_state_dict(model, optimizer)
    parts = {"model": weights, "optimizer": state, "schedule": schedule.state_dict()}
    dcp.load(parts, checkpoint_id=found[-1], no_dist=not dist.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    schedule.load_state_dict(parts["schedule"])
    return int(found[-1].name.removeprefix("step-"))


def train_step(model, optimizer, images, labels, args):
    """One step on this rank's share, in parts where it is large. Returns the sum of losses over the share."""
    loss_sum = 0.0
    size = args.micro_batch or len(labels)
    for x, y in zip(images.split(size), labels.split(size)):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=args.precision == "bfloat16"):
            output = model(x)
        loss = F.cross_entropy(output.float(), y, reduction="sum")
        (loss / len(labels)).backward()  # the mean over the share; natgrad averages over ranks
        loss_sum += loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    return loss_sum


def main(argv=None):
    args = arguments(argv)
    rank, ranks, device = join()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: STOP.append(received))
    # every rank saves its part below, and a process that is alone saves alone
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    warnings.filterwarnings("ignore", "state_dict.* holds this rank's part", natgrad.NatgradWarning)
    train, test = data()
    steps = args.epochs * (len(train) // args.batch)
    torch.manual_seed(args.seed)
    model = network().to(device)  # the plain model: natgrad averages gradients and divides the curvature over ranks
    groups = natgrad.decay_groups(model, args.weight_decay)
    optimizer = natgrad.SPNGD(model, lr=args.lr, params=groups, seed=args.seed)

    def rate(step):
        return min(1, (step + 1) / (args.warm_up + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    first = load(args.out, model, optimizer, schedule)
    batches = Batches(len(train), args.batch, rank, ranks, args.seed, first, steps)
    loader = DataLoader(train, batch_sampler=batches, num_workers=args.workers, pin_memory=device.type == "cuda")
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "log.jsonl").open("a") if rank == 0 else contextlib.nullcontext() as log:

        def tell(**row):
            if log:
                print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
                print(json.dumps(row), file=log, flush=True)

        if rank == 0:
            print(f"{ranks} ranks, step {first} of {steps}", flush=True)
        begun = time.perf_counter()
        for step, batch in enumerate(loader, first + 1):
            torch.manual_seed(
                args.seed + step * ranks + rank
            )  # dropout's numbers, so that a resumed run draws the same
            images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
            lr = optimizer.param_groups[0]["lr"]
            loss = train_step(model, optimizer, images, labels, args)
            schedule.step()
            loss, stopped = total(loss, len(STOP), device=device)  # one message; all ranks end at one step
            spent = time.perf_counter() - begun
            tell(step=step, lr=lr, loss=loss / args.batch, refreshed=optimizer.refreshed, seconds=spent)
            begun = time.perf_counter()
            if step % args.save_every == 0 or step == steps or stopped:
                average_buffers(model)
                save(args.out, step, model, optimizer, schedule, rank)
                tell(step=step, skipped=optimizer.skipped, **evaluate(model, test, rank, ranks, device))
            if stopped:
                break
    if rank == 0 and first == 0:
        print(optimizer.coverage())
    if dist.is_initialized():
        dist.destroy_process_group()
    return model


if __name__ == "__main__":
    main()
