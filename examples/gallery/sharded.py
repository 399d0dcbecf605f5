"""FSDP2: a model cut over ranks by `fully_shard`, its checkpoint, and a second optimizer that goes on from it.

    torchrun --nproc-per-node 2 examples/gallery/sharded.py --out runs/sharded

One learns: the optimizer is built after `fully_shard`, the loop stays as it was, and `torch.distributed.checkpoint`
saves and loads weights and curvature on any number of ranks. Alone, the script is one rank of one.

It prints, from rank 0: the loss, bytes of parameters and of the optimizer's state on this rank, and by how much a
run that went on from the checkpoint differs from the run that never stopped (0: not at all).
"""

import argparse
import os
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import natgrad
from natgrad_lab.data import Charlm
from natgrad_lab.models import Transformer


def built(source, seed):
    torch.manual_seed(seed)
    model = Transformer(blocks=2, width=64).build(source.shape(), source.classes())
    if torch.cuda.is_available():
        model.cuda()
    mesh = dist.device_mesh.init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, natgrad.SPNGD(model, lr=0.1)  # after fully_shard


def train(model, optimizer, texts, steps, batch):
    rank, ranks, losses = dist.get_rank(), dist.get_world_size(), []
    for step in steps:
        index = torch.randint(len(texts), (batch,), generator=torch.Generator().manual_seed(step))[rank::ranks]
        characters, following = (t.to(next(model.parameters()).device) for t in texts.batch(index))
        loss = F.cross_entropy(model(characters).flatten(0, 1), following.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def local(tensors):
    """What this rank holds of tensors, some of which are cut over ranks; scalars and empty parts aside."""
    own = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if isinstance(t, torch.Tensor)]
    return [t.detach() for t in own if t.numel()]


def size(tensors):
    return sum(t.numel() * t.element_size() for t in local(tensors))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128, help="texts of a step, of all ranks together")
    parser.add_argument("--out", default="runs/sharded", help="folder of the checkpoint, seen by all ranks")
    args = parser.parse_args(argv)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", **alone)
    # every rank saves its part below
    warnings.filterwarnings("ignore", "state_dict.* holds this rank's part", natgrad.NatgradWarning)
    source = Charlm()
    texts = source.load().train
    model, optimizer = built(source, seed=0)
    half = args.steps // 2
    first = train(model, optimizer, texts, range(half), args.batch)[0]
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=args.out)
    state = [t for of_one in optimizer.state.values() for t in of_one.values()]
    held = f"rank 0 holds {size(model.parameters()):,} bytes of parameters, {size(state):,} bytes of state"
    last = train(model, optimizer, texts, range(half, args.steps), args.batch)[-1]

    resumed, other = built(source, seed=1)  # other weights: all comes from the checkpoint
    weights, state = get_state_dict(resumed, other)
    parts = {"model": weights, "optimizer": state}
    dcp.load(parts, checkpoint_id=args.out)
    set_state_dict(resumed, other, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    train(resumed, other, texts, range(half, args.steps), args.batch)
    apart = max((p - q).abs().max().item() for p, q in zip(local(model.parameters()), local(resumed.parameters())))
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks, loss {first:.3f} -> {last:.3f}")
        print(held)
        print(f"resumed from step {half}: weights differ by {apart:g}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
