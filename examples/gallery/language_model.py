"""A small transformer learns python's help topics, character by character: SP-NGD beside AdamW.

One learns: attention, embeddings and norms need nothing; every weight has its own curvature. A text holds many
predictions, and natgrad sees how many the loss averages (`optimizer.assumed`). SP-NGD's learning rate is the one of
the README, AdamW's the best of 0.001, 0.003 and 0.01 in this script.

It prints: the loss (nats a character) of texts held out, for AdamW and SP-NGD every fifth of the steps; milliseconds
a step; what was assumed; the share of weights with curvature. Texts ship with python, nothing is downloaded.
"""

import argparse
import time

import torch
from torch.nn import functional as F

import natgrad
from natgrad_lab.data import Charlm
from natgrad_lab.models import Transformer

MAKE = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.01),
    "SPNGD": lambda model: natgrad.SPNGD(model, lr=0.1),
}


def loss_of(model, batch):
    characters, following = batch
    return F.cross_entropy(model(characters).flatten(0, 1), following.flatten())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64, help="texts of 64 characters")
    args = parser.parse_args(argv)
    source = Charlm()
    splits = source.load()
    held_out = splits.test.batch(torch.arange(128))
    for name, make in MAKE.items():
        torch.manual_seed(0)
        model = Transformer(blocks=2, width=64).build(source.shape(), source.classes())
        optimizer = make(model)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
        spent, told = 0.0, []
        for step in range(1, args.steps + 1):
            batch = splits.train.batch(torch.randint(len(splits.train), (args.batch,)))
            begun = time.perf_counter()
            loss_of(model, batch).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            spent += time.perf_counter() - begun
            if step % max(1, args.steps // 5) == 0:
                with torch.no_grad():
                    told.append(f"{loss_of(model, held_out):.3f}")
        print(f"{name}: {' '.join(told)}, {1000 * spent / args.steps:.0f} ms a step")
    print(optimizer.assumed)
    print(str(optimizer.coverage()).splitlines()[-1])


if __name__ == "__main__":
    main()
